"""The tables that `longattn eval` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from longattn.evaluate.results import Evaluation, ModelScores
from longattn.units import format_perplexity

__all__ = ["tables"]


def tables(evaluation: Evaluation) -> Iterator[Group]:
    """Perplexities by length, then a table for each retrieval task and model."""
    models, settings = evaluation.models, evaluation.settings
    yield _by_length(
        f"Perplexity of the same last {settings.last} tokens of {evaluation.pieces} of text, about, by the tokens in "
        "sight",
        settings.lengths,
        {
            "per token": [(model, [score.perplexity for score in model.last]) for model in models],
            "per byte": [(model, [score.byte_perplexity for score in model.last]) for model in models],
        },
    )
    if settings.sliding_windows:
        yield _by_length(
            f"Sliding-window perplexity per token, by the window's length, {evaluation.stride}",
            settings.lengths,
            {
                "LongLoRA: all tokens": [(model, [score.longlora for score in model.sliding]) for model in models],
                "YaRN: each once": [(model, [score.yarn for score in model.sliding]) for model in models],
            },
        )
    for task in settings.tasks:
        for model in models:
            yield _retrieval(evaluation, task, model)


def _by_length(title: str, lengths: Sequence[int], groups: dict[str, list[tuple[ModelScores, list[float]]]]) -> Group:
    table = _table()
    table.add_column("")
    table.add_column("model")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for name, rows in groups.items():
        for index, (model, values) in enumerate(rows):
            table.add_row("" if index else name, model.role, *map(format_perplexity, values))
    return Group(Text(title, style="bold"), table)


def _retrieval(evaluation: Evaluation, task: str, model: ModelScores) -> Group:
    """A row a depth, a column a length: questions answered exactly, of those asked."""
    settings = evaluation.settings
    title = f"{task}, {model.role}: answered exactly of {settings.trials}, {model.accuracy(task):.0%} of all"
    table = _table()
    table.add_column("depth", justify="right")
    for length in settings.lengths:
        table.add_column(f"{length:,}", justify="right")
    cells = {(cell.depth, cell.length): cell.correct for cell in model.cells if cell.task == task}
    for depth in settings.depths:
        table.add_row(f"{depth:g}", *(str(cells[depth, length]) for length in settings.lengths))
    return Group(Text(title, style="bold"), table)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
