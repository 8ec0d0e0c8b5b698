"""What the commands print with: a console as wide as their tables, and progress bars on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def table_console(width: int) -> Console:
    """A console on stdout, `width` columns wide where that is a file or a pipe: rich would assume 80."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def work_columns() -> tuple[ProgressColumn, ...]:
    """Of a bar over work whose parts have names."""
    return (
        BarColumn(24),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )


@contextmanager
def late_progress(*columns: ProgressColumn, transient: bool = False) -> Iterator[Callable[..., None]]:
    """A bar on stderr that begins with its first update, so that an error before it shows none.

    Yields a function of a description and what else `Progress.update` takes; the first call has to give a `total`.
    """
    bar = Progress(*columns, console=Console(stderr=True), transient=transient)
    tasks: list[TaskID] = []

    def update(description: str, **change: Any) -> None:
        if not tasks:
            bar.start()
            tasks.append(bar.add_task(description, total=change["total"]))
        bar.update(tasks[0], description=description, **change)

    try:
        yield update
    finally:
        if tasks:
            bar.stop()
