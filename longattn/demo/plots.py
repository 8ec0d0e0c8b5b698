"""The demo's pictures: perplexity over the tokens in sight, before, zero-shot and after the fine-tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longattn.demo.results import Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_plots"]

COLOURS = ("#3b6fb6", "#d9822b", "#3f9b6c", "#b5446e", "#7b5ea7", "#8a6d3b", "#4aa3b5")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BASELINE, INK, PALE = "#5c6670", "#2a2f36", "#e4e8ed"


def write_plots(results: Results, out: Path) -> list[Path]:
    """Draw `rope.png` and `attention.png` into `out`, and return their paths."""
    rope, attention = out / "rope.png", out / "attention.png"
    _rope_figure(results).savefig(rope)
    _attention_figure(results).savefig(attention)
    return [rope, attention]


def _rope_figure(results: Results) -> Figure:
    """Left as extended, right after the fine-tune, on one scale."""
    figure, (left, right) = _figure(results, 2)
    steps = results.settings["tune_steps"]
    titles = ("As extended, nothing trained", f"After {steps} steps at {results.length * results.settings['factor']}")
    for axes, title in zip((left, right), titles, strict=True):
        axes.set_title(title, fontsize=11, color=INK, loc="left")
    rows = results.table("rope")
    for row, style in zip(rows, _styles(rows), strict=True):
        _line(left, row.name, row.zero_shot, style)
        if row.tuned:
            _line(right, row.name, row.tuned, style)
    _finish(left, results)
    _finish(right, results)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9, title="rope method")
    return figure


def _attention_figure(results: Results) -> Figure:
    figure, (axes,) = _figure(results, 1)
    axes.set_title("Attention patterns", fontsize=11, color=INK, loc="left")
    rows = [results.row("none"), *results.table("attention"), *results.table("everything")]
    for row, style in zip(rows, _styles(rows), strict=True):
        name = "full attention, no change" if row.name == "none" else row.name
        scores = row.zero_shot if row.plan is None or row.tuned is None else row.tuned
        _line(axes, name if scores is row.zero_shot else f"{name} (tuned)", scores, style)
    _finish(axes, results)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return figure


def _figure(results: Results, panels: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 + 3.6 * panels, 4.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    axes[0].set_ylabel(f"perplexity per byte, same last bytes of {results.num_windows} texts", fontsize=9, color=INK)
    return figure, axes


def _styles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The unchanged model dashed and grey, the others each a colour and a marker."""
    styles: list[dict[str, Any]] = []
    for row in rows:
        if row.plan is None:
            styles.append({"color": BASELINE, "marker": "", "linestyle": "--", "linewidth": 1.8})
        else:
            index = sum("markersize" in style for style in styles) % len(COLOURS)
            styles.append({"color": COLOURS[index], "marker": MARKERS[index], "markersize": 5, "linewidth": 1.5})
    return styles


def _line(axes: Axes, name: str, scores: Mapping[int, float], style: Mapping[str, Any]) -> None:
    axes.plot(list(scores), list(scores.values()), label=name, **style)


def _finish(axes: Axes, results: Results) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(results.contexts))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_locator(FixedLocator([2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens in sight", fontsize=9, color=INK)
    axes.grid(axis="y", color=PALE)
    axes.axvspan(min(results.contexts), results.length * results.settings["factor"], color=PALE, alpha=0.45, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
