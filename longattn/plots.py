"""Pictures of rotary wavelengths and of attention patterns; changes with what they show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longattn.ops.band import Band, GroupBand, WindowBand
from longattn.pattern import Pattern

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_masks", "plot_wavelengths", "visible_cells", "visible_pairs"]

COLOURS = ("#3b6fb6", "#d9822b", "#3f9b6c", "#b5446e", "#7b5ea7", "#8a6d3b", "#4aa3b5", "#5c5c5c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
BASELINE = "#9aa3ad"
INK = "#2a2f36"
# What a cell of a mask picture shows, in the order of its values.
CELLS = {"later": "#ffffff", "hidden": "#e4e8ed", "seen": "#3b6fb6", "seen as a sink": "#d9822b"}
MAX_CELLS = 640


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _soften(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def plot_wavelengths(
    curves: Mapping[str, Tensor], baseline: Tensor | None = None, *, context: int | None = None, title: str = ""
) -> Figure:
    """Draw the wavelength `2 pi / inv_freq` of each frequency index, and how far each method stretches it.

    Args:
        curves: inv_freq, radians a token, (rotary_dim / 2,), by method.
        baseline: the unscaled inv_freq of the same shape, drawn below them and what the stretch is relative to.
        context: the original context length in tokens, drawn as a horizontal line.
        title: what heads the figure.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.
    """
    figure = _figure(11.0 if baseline is not None else 6.5, 4.4)
    panels = figure.subplots(1, 2 if baseline is not None else 1, squeeze=False)[0]
    panels[0].set_yscale("log", base=10)
    panels[0].set_ylabel("wavelength (tokens)")
    if baseline is not None:
        panels[0].plot(_wavelength(baseline), color=BASELINE, linewidth=4, label="unscaled", solid_capstyle="round")
        panels[1].axhline(1.0, color=BASELINE, linewidth=4)
        panels[1].set_ylabel("wavelength / unscaled wavelength")
    for index, (name, inv_freq) in enumerate(curves.items()):
        still = int((inv_freq == 0).sum())
        every = max(1, inv_freq.numel() // 16)
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            # curves that coincide stay visible: their markers stand at different indices
            "markevery": (index * every // max(1, len(curves)), every),
            "markersize": 4.5,
            "linewidth": 1.6,
        }
        label = f"{name} ({still} of {inv_freq.numel()} do not turn)" if still else name
        panels[0].plot(_wavelength(inv_freq), label=label, **style)
        if baseline is not None and inv_freq.numel() == baseline.numel():
            panels[1].plot(_wavelength(inv_freq) / _wavelength(baseline), **style)
    if context is not None:
        _draw_context(panels[0], context)
    for axes in panels:
        axes.set_xlabel("frequency index")
        axes.grid(color="#e9ecf0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        _soften(axes)
    panels[0].legend(frameon=False, fontsize=9, loc="lower right")
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    return figure


def _draw_context(axes: Axes, context: int) -> None:
    axes.axhline(context, color=INK, linestyle=(0, (5, 4)), linewidth=1.1)
    axes.annotate(
        f"original context: {context:,} tokens",
        (0.01, context),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=8.5,
        color=INK,
    )


def _wavelength(inv_freq: Tensor) -> numpy.ndarray:
    """Tokens a full turn takes; NaN, which is not drawn, where a channel does not turn."""
    return (2 * math.pi / inv_freq.double()).masked_fill(inv_freq == 0, math.nan).numpy()


def visible_cells(pattern: Pattern, num_tokens: int, shift: int = 0, max_cells: int = MAX_CELLS) -> Tensor:
    """What each query of one head sees of a text, as the cells of a picture.

    Args:
        pattern: which keys are visible.
        num_tokens: length of the text.
        shift: tokens by which this head's groups are shifted.
        max_cells: cells a side at most; in a longer text a row is one query of many, and a column is seen if one of
            its keys is.

    Returns:
        int64 (cells, cells), rows queries, columns keys: 0 a later key, 1 hidden, 2 seen, 3 seen as a sink.
    """
    cells = min(num_tokens, max_cells)
    edges = torch.linspace(0, num_tokens, cells + 1, dtype=torch.float64).round().to(torch.int64)  # (cells + 1,)
    first, last = edges[:-1], edges[1:] - 1  # keys of a column
    query = last.unsqueeze(1)  # (cells, 1)
    band = _band(pattern, shift)
    lo, hi = band.lo(query), band.hi(query)
    picture = (first <= query).to(torch.int64)
    picture[(first < pattern.sinks) & (first <= hi)] = 3
    picture[(last >= lo) & (first <= hi)] = 2
    return picture


def visible_pairs(pattern: Pattern, num_tokens: int, shift: int = 0) -> int:
    """Count the (query, key) pairs of one head, whose groups are shifted by `shift`, in a text of `num_tokens`."""
    query = torch.arange(num_tokens)  # (num_tokens,)
    band = _band(pattern, shift)
    lo, hi = band.lo(query).clamp(min=0), band.hi(query)
    return int((hi - lo + 1).sum() + lo.clamp(max=pattern.sinks).sum())


def _band(pattern: Pattern, shift: int) -> Band:
    if pattern.kind == "group":
        return GroupBand(pattern.size, shift, True)
    return WindowBand(pattern.size - 1 if pattern.kind == "window" else -1, 0)


def _panels(pattern: Pattern, num_heads: int) -> list[tuple[str, int]]:
    """Which heads share a picture, and their shift: heads from num_heads // 2 on are the shifted half."""
    half = num_heads // 2
    if not pattern.shift:
        return [("all heads", 0)]
    halves = [(range(half), 0), (range(half, num_heads), pattern.shift)]
    return [
        (f"head {heads[0]}" if len(heads) == 1 else f"heads {heads[0]}-{heads[-1]}", shift)
        for heads, shift in halves
        if heads
    ]


def plot_masks(patterns: Sequence[Pattern], num_tokens: int, *, num_heads: int = 2) -> Figure:
    """Draw which keys each query sees, a picture a pattern, and two where half of the heads have shifted groups.

    Args:
        patterns: what to draw, from left to right.
        num_tokens: length of the text.
        num_heads: query heads of the model, which the shifted half is named by.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: no pattern, or a number below 1.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    for name, number in (("num_tokens", num_tokens), ("num_heads", num_heads)):
        if number < 1:
            raise ValueError(f"plot_masks: {name} must be at least 1, got {number}")
    if not patterns:
        raise ValueError("plot_masks: patterns must name at least one, got none")
    panels = [(pattern, *panel) for pattern in patterns for panel in _panels(pattern, num_heads)]
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = _figure(max(3.6 * columns, 4.6), 4.1 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (pattern, heads, shift) in zip(grid, panels, strict=False):
        cells = visible_cells(pattern, num_tokens, shift)
        axes.imshow(
            cells.numpy(),
            cmap=ListedColormap(list(CELLS.values())),
            vmin=-0.5,
            vmax=len(CELLS) - 0.5,
            interpolation="nearest",
            extent=(-0.5, num_tokens - 0.5, num_tokens - 0.5, -0.5),
        )
        _rule_tokens(axes, num_tokens)
        _widen_sinks(axes, cells, num_tokens, pattern.sinks)
        share = visible_pairs(pattern, num_tokens, shift) / (num_tokens * (num_tokens + 1) / 2)
        axes.set_title(f"{pattern}\n{heads}", fontsize=10, color=INK)
        axes.set_xlabel(f"key\n{share:.0%} of what full attention sees", fontsize=9)
        axes.set_ylabel("query", fontsize=9)
        axes.tick_params(colors=INK, labelsize=8)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    shown = [name for name in CELLS if name != "seen as a sink" or any(pattern.sinks for pattern in patterns)]
    handles = [Patch(facecolor=CELLS[name], edgecolor="#b9c0c8", linewidth=0.6, label=name) for name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(shown), frameon=False, fontsize=9)
    return figure


def _widen_sinks(axes: Axes, cells: Tensor, num_tokens: int, sinks: int) -> None:
    """Sinks too narrow to see in a long text are drawn as a hundredth of its width."""
    from matplotlib.patches import Rectangle

    rows = (cells[:, 0] == 3).nonzero().flatten()
    if rows.numel() and sinks * 100 < num_tokens:
        top = int(rows[0]) * num_tokens / cells.shape[0]
        stripe = Rectangle((-0.5, top - 0.5), num_tokens / 100, num_tokens - top, color=CELLS["seen as a sink"])
        axes.add_patch(stripe)


def _rule_tokens(axes: Axes, num_tokens: int) -> None:
    """Ticks with room between them; hairlines between tokens, where they are few enough to tell apart."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda token, _: f"{token:,.0f}"))
    if num_tokens <= 64:
        lines = [token - 0.5 for token in range(num_tokens + 1)]
        axes.set_xticks(lines, minor=True)
        axes.set_yticks(lines, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
