"""What a run leaves: JSON with every sample, and the tables on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from longattn.bench.cases import GOALS
from longattn.bench.compare import Entry
from longattn.bench.kernels import Cell
from longattn.bench.memory import Growth
from longattn.bench.rope import RopeEntry
from longattn.bench.scaling import Fit, Point
from longattn.bench.text import milliseconds, size
from longattn.bench.timing import Clock

__all__ = ["Run", "goals_met", "tables", "write_json"]


@dataclass
class Run:
    """Everything one run found; loads are the machine's load average before and after."""

    command: str
    machine: dict[str, Any]
    clock: Clock = "wall"
    load_before: float | None = None
    load_after: float | None = None
    ceilings: dict[str, float] = field(default_factory=dict)
    attention: list[Entry] = field(default_factory=list)
    kernels: list[Cell] = field(default_factory=list)
    rope: list[RopeEntry] = field(default_factory=list)
    memory: list[Growth] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)


def goals_met(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The project's goals that these entries decide: the ratio found beside the ratio aimed at."""
    found = {(e.shape, e.dtype, e.work, e.peer): e.ratio for e in entries if e.ratio is not None}
    goals = [(goal, found.get((goal.shape, goal.dtype, goal.work, goal.peer))) for goal in GOALS]
    return [{**asdict(goal), "found": ratio, "met": ratio >= goal.ratio} for goal, ratio in goals if ratio is not None]


def write_json(run: Run, path: Path) -> None:
    path.write_text(json.dumps({"format": 1, **asdict(run), "goals": goals_met(run.attention)}, indent=1) + "\n")


def tables(run: Run) -> Iterator[Table | str]:
    """What to print, in order."""
    yield _machine(run)
    for (shape, dtype), entries in groupby(run.attention, lambda entry: (entry.shape, entry.dtype)):
        yield _attention(f"attention, {shape}, {dtype}", list(entries))
    for threads, cells in groupby(run.kernels, lambda cell: cell.threads):
        yield _kernels(f"compiled kernels, {threads} thread{'s' if threads > 1 else ''}", list(cells))
    goals = goals_met(run.attention)
    if goals:
        yield _goals(goals)
    for (shape, dtype), ways in groupby(run.rope, lambda entry: (entry.shape, entry.dtype)):
        yield _rope(f"rotary embedding, {shape}, {dtype}", list(ways))
    for (shape, dtype), growths in groupby(run.memory, lambda growth: (growth.shape, growth.dtype)):
        yield _memory(f"peak memory above the inputs, {shape}, {dtype}", list(growths))
    if run.points:
        yield _points(run.points)
    if run.fits:
        yield _fits(run.fits)
    load = run.load_before if run.load_before is not None else 0.0
    if load > 1.0 and run.clock == "wall":
        yield f"The machine was busy before the run (load {load}): trust ratios, not times; repeat when it is quiet."


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or column == "note" else "right")
    return table


def _machine(run: Run) -> str:
    facts = run.machine
    rates = ", ".join(
        f"{name.rsplit(' ', 1)[0]} {rate:,.0f} {name.rsplit(' ', 1)[1]}" for name, rate in run.ceilings.items()
    )
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['capability']}",
        f"longattn {facts['longattn']} (commit {facts['commit'] or 'unknown'}), torch {facts['torch']}, "
        f"Python {facts['python']}, {facts['date']}",
        f"{'wall-clock' if run.clock == 'wall' else 'processor'} time, load average {run.load_before} before, "
        f"{run.load_after} after" + (f"; ceilings: {rates}" if rates else ""),
    ]
    return "\n".join(lines)


def _time(ms: float | None, ratio: float | None, trouble: str) -> tuple[str, str]:
    if ms is None:
        return trouble or "not measured", ""
    return milliseconds(ms), "" if ratio is None else f"{ratio:.2f}x"


def _attention(title: str, entries: list[Entry]) -> Table:
    columns = ("peer", "forward ms", "/ longattn", "GFLOP/s", "forward + backward ms", "/ longattn", "GFLOP/s", "note")
    table = _table(title, *columns)
    for peer, both in groupby(entries, lambda entry: entry.peer):
        cells: list[str] = []
        for entry in both:
            rate = "" if entry.gflops is None else f"{entry.gflops:,.0f}"
            cells += [*_time(entry.median_ms, entry.ratio, entry.trouble), rate]
            note = entry.note
        table.add_row(peer, *cells, note)
    return table


def _kernels(title: str, cells: list[Cell]) -> Table:
    table = _table(title, "kernel", "shape", "dtype", "ms", "rate", "ceiling", "share", "goal", "")
    for cell in cells:
        rates = f"{cell.rate:,.0f} {cell.unit}", f"{cell.ceiling_rate:,.0f}, {cell.ceiling.rsplit(' ', 1)[0]}"
        goal, met = "", ""
        if cell.goal is not None:
            goal, met = f"{cell.goal:.0%}", "met" if cell.share >= cell.goal else "missed"
        work = cell.work, cell.shape, cell.dtype
        table.add_row(*work, milliseconds(cell.median_ms), *rates, f"{cell.share:.0%}", goal, met)
    return table


def _goals(goals: list[dict[str, Any]]) -> Table:
    table = _table("goals: a peer's time over longattn's", "shape", "dtype", "work", "peer", "goal", "found", "")
    for goal in goals:
        texts = [goal[name] for name in ("shape", "dtype", "work", "peer")]
        met = "met" if goal["met"] else "missed"
        table.add_row(*texts, f"{goal['ratio']:.1f}x", f"{goal['found']:.2f}x", met)
    return table


def _rope(title: str, ways: list[RopeEntry]) -> Table:
    table = _table(title, "way", "ms", "/ longattn", "error")
    for way in ways:
        error = "" if way.error is None else f"{way.error:.1e}"
        table.add_row(way.name, *_time(way.median_ms, way.ratio, way.trouble), error)
    return table


def _memory(title: str, growths: list[Growth]) -> Table:
    table = _table(title, "peer", "forward", "/ output", "backward", "/ gradients", "forward + backward", "note")
    for growth in growths:
        cells = []
        for number, unit in ((growth.forward, growth.output_bytes), (growth.backward, growth.grad_bytes)):
            cells += [size(number), "" if number is None else f"{number / unit:.2f}x"]
        table.add_row(growth.peer, *cells, size(growth.both), growth.trouble)
    return table


def _points(points: list[Point]) -> Table:
    table = _table("growth", "way", "over", "shape", "ms", "peak memory", "note")
    for point in points:
        time = "" if point.median_ms is None else milliseconds(point.median_ms)
        table.add_row(point.way, point.over, point.shape, time, size(point.memory_bytes), point.trouble)
    return table


def _fits(found: list[Fit]) -> Table:
    title = "fitted exponents: quantity ~ size ** exponent (the visible area's own exponent is what work can follow)"
    table = _table(title, "way", "quantity", "over", "exponent", "claimed", "visible area's", "points")
    for fit in found:
        area = "" if fit.visible is None else f"{fit.visible:.2f}"
        exponents = (f"{fit.exponent:.2f}", f"{fit.claimed:g}", area)
        table.add_row(fit.way, fit.quantity, fit.over, *exponents, str(fit.points))
    return table
