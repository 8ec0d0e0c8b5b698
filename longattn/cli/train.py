"""`longattn train RUN.yaml`: reads the run, shows a progress bar, and what came of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longattn.cli.plan_flags import errors_in_one_line

if TYPE_CHECKING:
    from longattn.train.run import TrainResult
    from longattn.train.watch import Progress

__all__ = ["train"]


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A YAML file with the keys of a run: train.yaml")],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last checkpoint in the run's folder, where there is one: "
            "longattn train train.yaml --resume",
        ),
    ] = False,
) -> None:
    """Extend a checkpoint and train it, by one YAML file: the plan's keys and model, text, length, steps, out, ...

    For example: longattn train train.yaml
    """
    with errors_in_one_line("train"):
        from longattn.train.spec import TrainSpec

        spec = TrainSpec.from_yaml(run)
        if resume:
            spec = replace(spec, resume=True)
        import accelerate  # noqa: F401  # Trainer says only later that it needs it
        import transformers

        warnings.simplefilter("ignore", FutureWarning)  # of transformers to PEFT

        from longattn.train.run import train as run_it

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        with _bar(spec.steps) as progress:
            result = run_it(spec, progress=progress)
        typer.echo(_summary(result))
        for note in result.notes:
            typer.echo(note)
        typer.echo(f"wrote {Path(spec.out) / result.checkpoint.name}, beside it log.json and loss.png")


@contextmanager
def _bar(steps: int) -> Iterator[Progress]:
    """A bar on stderr over the steps, with the newest loss and speed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=steps)

        def progress(doing: str, step: int, steps: int, entry: dict[str, Any]) -> None:
            shown = [doing]
            shown += [f"{key} {entry[key]:.4f}" for key in ("loss", "eval_loss") if key in entry]
            shown += [f"{entry['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in entry else []
            bar.update(task, description="  ".join(shown), completed=step)

        yield progress


def _summary(result: TrainResult) -> str:
    """First and last losses, and the speed, a line each."""
    history, lines = result.log["history"], []
    for key, name in (("loss", "training loss"), ("eval_loss", "held-out loss")):
        entries = [entry for entry in history if key in entry]
        if entries:
            first, last = entries[0], entries[-1]
            lines.append(f"{name}  {first[key]:.4f} (step {first['step']}) -> {last[key]:.4f} (step {last['step']})")
    speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
    if speeds:
        lines.append(f"tokens/s       {speeds[-1]:,.0f}")
    return "\n".join(lines)
