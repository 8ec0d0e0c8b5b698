"""`longattn eval MODEL`: reads flags, measures with a progress bar, prints tables, writes JSON and the page."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longattn.cli.plan_flags import errors_in_one_line

if TYPE_CHECKING:
    from longattn.evaluate.results import Settings
    from longattn.text import Document

__all__ = ["eval", "parse_lengths"]

WIDTH = 120  # of a table that goes to a file or a pipe
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
DEVICES = ("cpu", "cuda")


def eval(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint's folder, or the id of a model.")],
    text: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="Text that the model was not trained on: a file, a folder, .jsonl, .parquet, a saved dataset: "
            "--text books/",
        ),
    ],
    lengths: Annotated[str, typer.Option(help="Tokens in sight, k times 1024: --lengths 4k,8k,32k")],
    before: Annotated[
        str | None,
        typer.Option(metavar="MODEL0", help="The model as it was, measured on the same text too: --before ./original"),
    ] = None,
    retrieval: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Also what is found in long texts: --retrieval passkey,multikey"),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one HTML page with all of it: --report report.html")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the numbers after every piece; run again, it goes on from there: --json scores.json",
        ),
    ] = None,
    last: Annotated[int, typer.Option(help="Tokens scored at the end of each piece of text: --last 512")] = 256,
    windows: Annotated[int, typer.Option(help="Pieces of text to score: --windows 32")] = 16,
    sliding_windows: Annotated[
        int, typer.Option(help="Sliding windows at each length, 0 for none: --sliding-windows 64")
    ] = 16,
    stride: Annotated[int, typer.Option(help="Tokens from one sliding window to the next: --stride 256")] = 256,
    depths: Annotated[
        str, typer.Option(help="Where in the text answers stand, 0 to 1: --depths 0,0.25,0.5,0.75,1")
    ] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option(help="Questions for each task, length and depth: --trials 10")] = 5,
    seed: Annotated[int, typer.Option(help="Of the questions drawn: --seed 1")] = 0,
    join: Annotated[bool, typer.Option("--join", help="Make one text of all, where each is short: --join")] = False,
    field: Annotated[
        str, typer.Option(help="The column of .jsonl, .parquet and datasets that is text: --field content")
    ] = "text",
    dtype: Annotated[
        str, typer.Option(help="What to compute in, auto is the checkpoint's own: --dtype float32")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda, where to compute: --device cuda")] = "cpu",
) -> None:
    """Measure what a model makes of long text: perplexity under growing context, and finding things.

    For example: longattn eval ./longer --before ./model --text books/ --lengths 4k,8k,32k --report report.html
    """
    with errors_in_one_line("eval"):
        from longattn.evaluate.results import Settings

        settings = Settings(
            lengths=parse_lengths(lengths),
            last=last,
            windows=windows,
            stride=stride,
            sliding_windows=sliding_windows,
            tasks=[] if retrieval is None else [name.strip() for name in retrieval.split(",")],
            depths=_parse_depths(depths),
            trials=trials,
            seed=seed,
            dtype=_parse_dtype(dtype),
        )
        models = [("model", model)] if before is None else [("before", before), ("after", model)]
        _run(models, text, settings, device=device, report=report, json_file=json_file, join=join, field=field)


def parse_lengths(text: str) -> list[int]:
    """Lengths in tokens, ascending.

    Raises:
        ValueError: one is none.

    Example:
        >>> parse_lengths("4k,512")
        [512, 4096]
    """
    lengths = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)([km]?)", part.strip().lower())
        if match is None or int(match[1]) < 1:
            raise ValueError(f"--lengths must be like 4k,8k or 512,1024, got {part.strip()!r} in {text!r}")
        lengths.add(int(match[1]) * UNITS[match[2]])
    return sorted(lengths)


def _parse_depths(text: str) -> list[float]:
    try:
        depths = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"--depths must be like 0,0.5,1, got {text!r}") from None
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"--depths must be 0 to 1, got {text!r}")
    return depths


def _parse_dtype(text: str) -> str:
    if text not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got {text!r}")
    return text


def _run(
    models: list[tuple[str, str]],
    text: Path,
    settings: Settings,
    *,
    device: str,
    report: Path | None,
    json_file: Path | None,
    join: bool,
    field: str,
) -> None:
    import torch
    import transformers

    from longattn.cli.console import late_progress, table_console, work_columns
    from longattn.cli.eval_tables import tables
    from longattn.evaluate.page import write_page
    from longattn.evaluate.run import evaluate, work_of

    if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device must be {' or '.join(DEVICES)} and be here, got {device!r}")
    for name, path in (("--report", report), ("--json", json_file)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"{name} must be a file in a folder that is there, got {str(path)!r}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    total = work_of(settings, len(models))
    with late_progress(*work_columns(), transient=True) as update:
        evaluation = evaluate(
            models,
            _documents(text, field, join),
            settings,
            text_name=str(text),
            saved=json_file,
            device=device,
            command=shlex.join(["longattn", *sys.argv[1:]]),
            progress=lambda doing, tokens: update(doing, total=total, advance=tokens),
        )
    console = table_console(WIDTH)
    for table in tables(evaluation):
        console.print(table)
    for path in (json_file, report):
        if path is report and report is not None:
            write_page(evaluation, report)
        if path is not None:
            typer.echo(f"wrote {path}")


def _documents(text: Path, field: str, join: bool) -> list[Document]:
    from longattn.text import Document, load_documents

    if not text.exists():
        raise ValueError(f"--text must be a file or a folder, got {str(text)!r}, which is not there")
    documents = list(load_documents(text, field=field))
    if not documents:
        raise ValueError(f"--text {text} holds no text")
    if join:
        return [Document(f"{len(documents)} texts, joined", "\n\n".join(doc.text for doc in documents))]
    return documents
