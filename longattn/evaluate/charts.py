"""A line chart as inline SVG, whose colours are the page's own; changes with how a chart looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from longattn.units import format_perplexity

__all__ = ["Line", "line_chart"]

WIDTH, HEIGHT = 720, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 112, 26, 46
LOG_FROM = 4.0  # largest over smallest value from which the axis is logarithmic
LABEL_HEIGHT = 16
MOST_TICKS = 10


@dataclass(frozen=True)
class Line:
    """A named line: (length, value) pairs, those that are not finite left out of it; `kind` is its CSS class."""

    name: str
    kind: str
    points: Sequence[tuple[int, float]]

    @property
    def drawn(self) -> list[tuple[int, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if math.isfinite(y)]


def line_chart(lines: Sequence[Line], *, x_label: str, y_label: str, marks: Sequence[tuple[int, str]] = ()) -> str:
    """Draw lines over lengths, on a base-2 logarithmic axis.

    Args:
        lines: to draw; each point shows its numbers when pointed at.
        x_label: below the axis.
        y_label: above it.
        marks: lengths to mark by a vertical line, and what to call them.

    Returns:
        An `<svg>` element; empty where nothing can be drawn.
    """
    values = [y for line in lines for _, y in line.drawn]
    if not values:
        return ""
    xs = sorted({x for line in lines for x, _ in line.points})
    across = _Axis(math.log2(xs[0]), math.log2(xs[-1]), LEFT, WIDTH - RIGHT)
    logarithmic = max(values) / min(values) >= LOG_FROM
    ticks = _ticks(min(values), max(values), logarithmic)
    scale = math.log if logarithmic else float
    up = _Axis(scale(ticks[0]), scale(ticks[-1]), HEIGHT - BOTTOM, TOP)
    parts = [_text(LEFT - 46, 12, y_label + (", logarithmic" if logarithmic else ""), "axis")]
    for tick in ticks:
        height = up(scale(tick))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(_text(LEFT - 8, height + 4, f"{tick:g}", "tick", "end"))
    for x in xs:
        parts.append(_text(across(math.log2(x)), HEIGHT - BOTTOM + 18, f"{x:,}", "tick", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "axis", "middle"))
    for length, name in marks:
        if xs[0] <= length <= xs[-1]:
            place = across(math.log2(length))
            parts.append(f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(_text(place, TOP - 4, name, "marked", "middle"))
    ends = []
    for line in lines:
        placed = [(across(math.log2(x)), up(scale(y)), x, y) for x, y in line.drawn]
        parts.append(_drawn(line, placed))
        if placed:
            ends.append((placed[-1][1], line))
    for y, line in _apart(ends):
        parts.append(_text(WIDTH - RIGHT + 10, y + 4, line.name, f"label {line.kind}"))
    summary = "; ".join(
        f"{line.name}: " + ", ".join(f"{format_perplexity(y)} at {x:,}" for x, y in line.points) for line in lines
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{y_label}. {summary}")}">'
        f"{''.join(parts)}</svg>"
    )


@dataclass(frozen=True)
class _Axis:
    """Where a value between `low` and `high` lies between two pixels."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        share = 0.5 if self.high == self.low else (value - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)


def _drawn(line: Line, placed: Sequence[tuple[float, float, int, float]]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in placed)
    dots = "".join(
        f'<circle class="dot {line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">'
        f"<title>{escape(line.name)}: {format_perplexity(value)} at {length:,}</title></circle>"
        for x, y, length, value in placed
    )
    return f'<polyline class="line {line.kind}" points="{path}"/>{dots}'


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round values that enclose both ends, a handful of them."""
    if logarithmic:
        decades = range(math.floor(math.log10(low)), min(math.ceil(math.log10(high)), 308) + 1)  # 1e309 is no float
        steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
        values = [step * 10.0**decade for decade in decades[:: -(-len(decades) // MOST_TICKS)] for step in steps]
        values += [10.0 ** decades[-1]] if values[-1] < high else []
    else:
        span = max(high - low, 0.02 * high, 1e-9)
        decade = math.floor(math.log10(span / 4))
        step = next(f * 10.0**e for e in (decade, decade + 1) for f in (1, 2, 5) if f * 10.0**e >= span / 4)
        values = [step * n for n in range(math.floor(low / step), math.ceil(high / step) + 1)]
    below = [value for value in values if value <= low] or values[:1]
    above = [value for value in values if value >= high] or values[-1:]
    return [value for value in values if below[-1] <= value <= above[0]]


def _apart(ends: Sequence[tuple[float, Line]]) -> list[tuple[float, Line]]:
    """Labels moved down until none covers another."""
    placed: list[tuple[float, Line]] = []
    for y, line in sorted(ends, key=lambda end: end[0]):
        placed.append((max(y, placed[-1][0] + LABEL_HEIGHT) if placed else y, line))
    return placed


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
