"""How time and memory grow over the length and over the window, the other one fixed: fitted exponents."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from longattn.bench.cases import Case, parse_case
from longattn.bench.memory import measure
from longattn.bench.peers import PEERS, Peer
from longattn.bench.timing import Clock, Sample, interleave, median_ms

__all__ = ["GRID", "QUICK_GRID", "Fit", "Grid", "Point", "fit_exponent", "fits", "measure_scaling"]

WINDOW, FULL, DENSE = "longattn, window", "longattn, full", "sdpa, dense mask"
OVER = ("S", "W")


@dataclass(frozen=True)
class Grid:
    """Sizes to measure: lengths at `window`, windows at `tokens`; full attention while a call stays within `most_s`."""

    lengths: tuple[int, ...]
    windows: tuple[int, ...]
    window: int
    tokens: int
    heads: int = 8
    head_dim: int = 64
    most_s: float = 4.0


GRID = Grid((2048, 4096, 8192, 16384, 32768), (128, 256, 512, 1024, 2048), 512, 16384)
QUICK_GRID = Grid((512, 1024, 2048, 4096), (32, 64, 128, 256), 64, 2048, heads=2)


@dataclass
class Point:
    """One size of one way: `over` says which series it belongs to."""

    over: str
    way: str
    shape: str
    size: int
    visible: float
    memory_bytes: int | None = None
    samples: list[Sample] = field(default_factory=list)
    median_ms: float | None = None
    trouble: str = ""


@dataclass(frozen=True)
class Fit:
    """Least squares of log(quantity) over log(size): quantity ~ size ** exponent."""

    way: str
    quantity: str
    over: str
    exponent: float
    claimed: float
    visible: float | None
    points: int


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log(values) over log(sizes) by least squares.

    Example:
        >>> round(fit_exponent([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    if len(sizes) != len(values) or len(set(sizes)) < 2:
        raise ValueError(f"fit_exponent: at least 2 different sizes, each with a value, got {sizes!r} and {values!r}")
    if min(*sizes, *values) <= 0:
        raise ValueError(f"fit_exponent: sizes and values must be above 0, got {sizes!r} and {values!r}")
    x, y = ([math.log(number) for number in numbers] for numbers in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def measure_scaling(
    grid: Grid,
    dtype: str,
    *,
    rounds: int,
    memory: bool,
    clock: Clock = "wall",
    say: Callable[[str], None] = lambda text: None,
) -> list[Point]:
    """Time every size in turns with the others of its series, then measure memory, each in a process of its own.

    Results at these shapes are what `compare` and the tests check; here they are only timed.
    """
    points: list[Point] = []
    for over, way, pattern, sizes in _series(grid):
        timed: dict[str, Callable[[], object]] = {}
        found: dict[str, Point] = {}
        for tokens, size, text in sizes:
            case = parse_case(f"B1 H{grid.heads} S{tokens} D{grid.head_dim} {pattern}{text}", dtype)
            point = Point(over, way, case.shape, size, case.pattern.visible(tokens))
            points.append(point)
            say(f"{way} over {over}: {case.shape}")
            point.trouble = _too_big(way, case, grid, list(found.values()))
            if point.trouble:
                continue
            call = _call(way, case)
            point.samples = interleave({"first": call, "again": call}, rounds=1, budget_s=0)["again"]
            point.median_ms = median_ms(point.samples, clock)
            timed[case.shape], found[case.shape] = call, point
        for shape, samples in interleave(timed, rounds=rounds, budget_s=2 * grid.most_s).items():
            found[shape].samples, found[shape].median_ms = samples, median_ms(samples, clock)
        del timed
        for point in found.values() if memory else ():
            say(f"{way} over {over}: memory of {point.shape}")
            growth = measure(parse_case(point.shape, dtype), _peer(way), backward=False)
            point.memory_bytes, point.trouble = growth.forward, growth.trouble
    return points


def fits(points: Sequence[Point]) -> list[Fit]:
    """Exponents of time and memory for each series, beside what is claimed: O(S * S) in full, O(S * W) in a window."""
    claims = {WINDOW: {("time", "S"): 1.0, ("time", "W"): 1.0, ("memory", "S"): 1.0, ("memory", "W"): 0.0}}
    claims[FULL] = {("time", "S"): 2.0, ("memory", "S"): 1.0}
    claims[DENSE] = {("time", "S"): 2.0, ("memory", "S"): 2.0}
    found = []
    for way, of_way in claims.items():
        for (quantity, over), claimed in of_way.items():
            series = [point for point in points if point.way == way and point.over == over]
            values = [(p.size, p.median_ms if quantity == "time" else p.memory_bytes, p.visible) for p in series]
            whole = [(size, value, area) for size, value, area in values if value]
            if len(whole) < 2:
                continue
            sizes, measured, areas = zip(*whole, strict=True)
            visible = fit_exponent(sizes, areas) if quantity == "time" else None
            found.append(Fit(way, quantity, over, fit_exponent(sizes, measured), claimed, visible, len(whole)))
    return found


def _series(grid: Grid) -> list[tuple[str, str, str, list[tuple[int, int, str]]]]:
    """Over what, which way, its pattern; for each point the tokens, the size to plot it at, the pattern's size."""
    lengths = [(tokens, tokens, str(grid.window)) for tokens in grid.lengths]
    whole = [(tokens, tokens, "") for tokens in grid.lengths]
    windows = [(grid.tokens, window, str(window)) for window in grid.windows]
    return [
        ("S", WINDOW, "W", lengths),
        ("W", WINDOW, "W", windows),
        ("S", FULL, "full", whole),
        ("S", DENSE, "W", lengths),
    ]


def _peer(way: str) -> Peer:
    return next(peer for peer in PEERS if peer.name == (DENSE if way == DENSE else "longattn"))


def _call(way: str, case: Case) -> Callable[[], object]:
    attend, inputs = _peer(way).prepare(case), case.inputs()[:3]

    def call() -> object:
        with torch.no_grad():
            return attend(*inputs)

    return call


def _too_big(way: str, case: Case, grid: Grid, before: list[Point]) -> str:
    """Why a quadratic point is left out, or ""."""
    if way == WINDOW:
        return ""
    if way == DENSE and hasattr(os, "sysconf"):
        needed = case.tokens**2 * (1 + case.dtype.itemsize)  # the bool mask, and the float one made of it in the call
        if needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 8:
            return "left out: mask too large for this machine"
    if before and before[-1].median_ms is not None:
        expected = before[-1].median_ms / 1e3 * (case.tokens / before[-1].size) ** 2
        if expected > grid.most_s:
            return f"left out: would take about {expected:.0f} s a call"
    return ""
