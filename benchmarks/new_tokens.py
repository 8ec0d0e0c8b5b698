"""How new tokens start: the loss on text that uses them, before training and after the same few steps.

    OMP_NUM_THREADS=1 python benchmarks/new_tokens.py --out benchmarks/results

Ten new tokens with names of their own (`<indent>`, `<self>`, ...) stand for what Python's standard library is full of;
the text is rewritten with them. The demo's small model, which reads bytes and has never seen them, gets the tokens by
five starts, then trains for a few steps, new rows alone or all weights; held-out text is scored on the way. The same
rows in the same order for all starts of a seed. Writes `new-tokens-<date>.json` and a PNG; a few minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import longattn
from longattn.bench.machine import machine_facts
from longattn.demo import MODEL_FOLDER
from longattn.demo.text import read_documents
from longattn.train import PackedDataset, new_rows, packed_dataset

# A new token, and the text that it stands for, which is its description too.
STANDS_FOR = {
    "<indent>": "    ",
    "<self>": "self.",
    "<def>": "def ",
    "<return>": "return ",
    "<import>": "import ",
    "<raise>": "raise ",
    "<isinstance>": "isinstance(",
    "<none>": "None",
    "<call>": "()",
    "<is>": " = ",
}
STARTS = ("random", "mean", "mean of seen", "subwords", "descriptions")
COLOURS = ("#5c6670", "#3b6fb6", "#7b5ea7", "#d9822b", "#3f9b6c")
# What learns, and the peak learning rate at which it does: the same for all starts.
PARTS = {"new rows": 3e-2, "all weights": 1e-3}
CONTEXT = 256


@dataclass(frozen=True)
class Settings:
    """How much to run: rows of held-out text, rows a step, the steps after which it is scored, seeds."""

    scored_rows: int = 48
    batch: int = 8
    scored_after: Sequence[int] = (0, 4, 8, 16, 32)
    seeds: Sequence[int] = (0, 1, 2, 3)
    train_chars: int = 1_000_000


def rewritten(texts: Iterator[str]) -> Iterator[str]:
    """Texts with each new token in the place of what it stands for."""
    for text in texts:
        for token, spelled in STANDS_FOR.items():
            text = text.replace(spelled, token)
        yield text


def start_of(name: str) -> Any:
    """`init` of `longattn.add_tokens`, by the name of a start."""
    if name == "random":  # as a new embedding is drawn
        draw = torch.Generator().manual_seed(0)
        return lambda token, rows: torch.randn(rows.shape[1], generator=draw) * 0.02
    if name == "mean of seen":  # of 257 rows, those of bytes that the standard library's sources are made of
        seen = sorted(set("".join(document.text for document in read_documents(scored=False)[:200]).encode()))
        return lambda token, rows: rows[seen].mean(0)
    return dict(STANDS_FOR) if name == "descriptions" else name


def with_tokens(start: str) -> tuple[Any, Any, list[int]]:
    """The demo's model and tokenizer with the new tokens, and their ids."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    report = longattn.add_tokens(model, tokenizer, list(STANDS_FOR), init=start_of(start))
    return model, tokenizer, list(report.ids.values())


@torch.no_grad()
def score(model: torch.nn.Module, rows: PackedDataset, ids: Sequence[int]) -> dict[str, float]:
    """Mean loss in nats of all tokens, and of new ones alone, of rows of held-out text."""
    training = model.training
    model.eval()
    wanted, losses, new = torch.tensor(ids), [], []
    for first in range(0, len(rows), 16):
        batch = torch.stack([rows[at]["input_ids"] for at in range(first, min(first + 16, len(rows)))])  # (n, CONTEXT)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        losses.append(cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").flatten())
        new.append(torch.isin(batch[:, 1:], wanted).flatten())
    model.train(training)
    every, which = torch.cat(losses).double(), torch.cat(new)
    return {"loss": every.mean().item(), "new_token_loss": every[which].mean().item(), "places": int(which.sum())}


class Score(TrainerCallback):
    """Scores held-out rows after the steps of the settings."""

    def __init__(self, rows: PackedDataset, ids: Sequence[int], steps: Sequence[int]) -> None:
        self.rows, self.ids, self.steps = rows, ids, steps
        self.scores: dict[int, dict[str, float]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scores[0] = score(kwargs["model"], self.rows, self.ids)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.scores[state.global_step] = score(kwargs["model"], self.rows, self.ids)


def run_one(part: str, start: str, seed: int, settings: Settings, texts: tuple[list[str], list[str]]) -> dict[str, Any]:
    """Add the tokens by a start, train, and score on the way."""
    model, tokenizer, ids = with_tokens(start)
    trained, scored = (packed_dataset(some, tokenizer, CONTEXT) for some in texts)
    scored.ids = scored.ids[: settings.scored_rows * CONTEXT]
    if part == "new rows":
        model = new_rows(model, ids)
    scores = Score(scored, ids, settings.scored_after)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=max(settings.scored_after),
            per_device_train_batch_size=settings.batch,
            learning_rate=PARTS[part],
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            seed=seed,
            data_seed=seed,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            label_names=["labels"],
        )
        trainer = Trainer(model, arguments, train_dataset=trained, callbacks=[scores])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {"learns": part, "start": start, "seed": seed, "scores": scores.scores}


def read_texts(settings: Settings) -> tuple[list[str], list[str]]:
    """Text to train on and text to score, rewritten."""
    both = []
    for scored, chars in ((False, settings.train_chars), (True, settings.scored_rows * CONTEXT * 12)):
        taken, total = [], 0
        for document in read_documents(scored=scored, min_chars=2000):
            taken.append(document.text[:16384])
            total += len(taken[-1])
            if total >= chars:
                break
        both.append(list(rewritten(iter(taken))))
    return both[0], both[1]


def table(runs: Sequence[dict[str, Any]], value: str = "loss") -> str:
    """Means and standard deviations over seeds, a row a start, as Markdown."""
    steps = sorted(next(iter(runs))["scores"])
    heads = ["learns", "start", *(f"{step} steps" for step in steps)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for part in dict.fromkeys(run["learns"] for run in runs):
        for start in dict.fromkeys(run["start"] for run in runs):
            found = [run["scores"] for run in runs if (run["learns"], run["start"]) == (part, start)]
            cells = []
            for step in steps:
                values = [scores[step][value] for scores in found]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.3f}" + (f" ± {spread:.3f}" if step else ""))
            lines.append(f"| {part} | {start} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss over steps, a panel for what learns, a line a start, the seeds' range shaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys(run["learns"] for run in runs))
    figure = Figure(figsize=(5 * len(parts), 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, part in zip(figure.subplots(1, len(parts), sharey=True, squeeze=False)[0], parts, strict=True):
        for start, colour in zip(STARTS, COLOURS, strict=True):
            found = [run["scores"] for run in runs if (run["learns"], run["start"]) == (part, start)]
            if not found:
                continue
            steps = sorted(found[0])
            columns = [[scores[step]["loss"] for scores in found] for step in steps]
            axes.plot(steps, [statistics.mean(column) for column in columns], "o-", color=colour, label=start, ms=4)
            axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2)
        axes.set_title(f"{part} learn", loc="left", fontsize=11)
        axes.set_xlabel("steps")
        axes.grid(axis="y", color="#e4e8ed")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("held-out loss, nats a token")
    first.legend(title="new rows start as", frameon=False)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("longattn-bench"))
    parser.add_argument("--seeds", type=int, default=len(Settings().seeds))
    parser.add_argument("--scored-after", type=int, nargs="+", default=list(Settings().scored_after))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    args = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = Settings(seeds=range(args.seeds), scored_after=tuple(args.scored_after))
    texts = read_texts(settings)
    runs = []
    for part in PARTS:
        for seed in settings.seeds:
            for start in args.starts:
                runs.append(run_one(part, start, seed, settings, texts))
                print(part, seed, start, {k: round(v["loss"], 3) for k, v in runs[-1]["scores"].items()}, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"new-tokens-{date.today().isoformat()}.json"
    facts = {**machine_facts(), "tokens": STANDS_FOR, "learning_rates": PARTS}
    path.write_text(json.dumps({"facts": facts, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    plot(runs, path.with_suffix(".png"))
    print(table(runs), "\n\nnew tokens alone:\n", table(runs, "new_token_loss"), sep="\n")


if __name__ == "__main__":
    main()
