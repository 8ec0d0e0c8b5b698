"""The benchmark's pictures: ratios over longattn, shares of the machine's ceilings, growth over length and window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longattn.bench.compare import BOTH, FORWARD
from longattn.bench.peers import OURS, PEERS
from longattn.bench.report import Run
from longattn.bench.text import milliseconds

__all__ = ["plot_comparison", "plot_kernels", "plot_scaling"]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _facts(run: Run) -> str:
    machine, clock = run.machine, "wall-clock" if run.clock == "wall" else "processor"
    facts = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date'][:10]}"
    return f"{facts}, {clock} time"


def plot_comparison(run: Run, path: Path) -> None:
    """Times over longattn's: right of the line a peer is slower. A row a case, forward beside forward+backward."""
    cases = list(dict.fromkeys((entry.shape, entry.dtype) for entry in run.attention))
    figure, axes = _figure(len(cases), 2, 12, 0.6 + 2.0 * len(cases))
    colours = {peer.name: f"C{number}" for number, peer in enumerate(PEERS)}
    for row, (shape, dtype) in enumerate(cases):
        for column, work in enumerate((FORWARD, BOTH)):
            axis = axes[row][column]
            key = (shape, dtype, work)
            entries = [entry for entry in run.attention if (entry.shape, entry.dtype, entry.work) == key]
            timed = [(e.peer, e.ratio, e.median_ms) for e in reversed(entries) if e.ratio and e.median_ms]
            ratios = [ratio for _, ratio, _ in timed]
            names = [name for name, _, _ in timed]
            bars = axis.barh(names, ratios, color=[colours.get(name, "grey") for name in names])
            axis.bar_label(
                bars, [f"{ratio:.2f}x, {milliseconds(ms)} ms" for _, ratio, ms in timed], padding=3, fontsize=7
            )
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.set_xscale("log")
            axis.set_xlim(min(0.2, *ratios, 0.2) / 1.5, max(4.0, *ratios, 4.0) * 8)
            axis.set_title(f"{shape}, {dtype}, {work}", fontsize=9)
            axis.tick_params(labelsize=7)
    figure.suptitle(f"a peer's time over {OURS}'s: {_facts(run)}", fontsize=9)
    figure.savefig(path, dpi=110)


def plot_kernels(run: Run, path: Path) -> None:
    """Shares of the ceilings, a column for each number of threads; a tick where the project's goal is."""
    columns = list(dict.fromkeys(cell.threads for cell in run.kernels))
    most = max(sum(cell.threads == threads for cell in run.kernels) for threads in columns)
    figure, axes = _figure(1, len(columns), 8 * len(columns), 1.2 + 0.2 * most)
    for axis, threads in zip(axes[0], columns, strict=True):
        cells = [cell for cell in reversed(run.kernels) if cell.threads == threads]
        colours = [{"float32": "C0", "bfloat16": "C1"}.get(cell.dtype, "C2") for cell in cells]
        bars = axis.barh([cell.name for cell in cells], [cell.share for cell in cells], color=colours)
        axis.bar_label(bars, [f"{cell.share:.0%}" for cell in cells], padding=3, fontsize=6)
        goals = [(cell.goal, cell.name) for cell in cells if cell.goal is not None]
        axis.plot(*zip(*goals, strict=True), "|", color="black", markersize=9, label="goal")
        axis.set_xlim(0, 1.25)
        axis.set_title(f"{threads} thread{'s' if threads > 1 else ''}", fontsize=9)
        axis.tick_params(labelsize=6)
        axis.legend(fontsize=7, loc="lower right")
    figure.suptitle(f"share of the ceiling measured in turns with it: {_facts(run)}", fontsize=9)
    figure.savefig(path, dpi=110)


def plot_scaling(run: Run, path: Path) -> None:
    """Time and memory over S and over W, on logarithmic axes, with the fitted exponents in the legend."""
    figure, axes = _figure(2, 2, 11, 8)
    fitted = {(fit.way, fit.quantity, fit.over): fit for fit in run.fits}
    for row, quantity in enumerate(("time", "memory")):
        for column, over in enumerate(("S", "W")):
            axis = axes[row][column]
            for way in dict.fromkeys(point.way for point in run.points):
                series = [point for point in run.points if (point.way, point.over) == (way, over)]
                pairs = [(p.size, p.median_ms if quantity == "time" else p.memory_bytes) for p in series]
                known = [(size, value) for size, value in pairs if value]
                if not known:
                    continue
                fit = fitted.get((way, quantity, over))
                text = way if fit is None else f"{way}: {over}^{fit.exponent:.2f} (claimed {fit.claimed:g})"
                axis.plot([size for size, _ in known], [value for _, value in known], marker="o", label=text)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            if axis.has_data() and high < 10 * low:  # a flat series fills the picture with noise otherwise
                middle = (low * high) ** 0.5
                axis.set_ylim(middle / 10**0.5, middle * 10**0.5)
            axis.set_xlabel({"S": "S (tokens), at fixed W", "W": "W (keys), at fixed S"}[over])
            axis.set_ylabel({"time": "forward (ms)", "memory": "peak above the inputs (bytes)"}[quantity])
            if axis.has_data():
                axis.legend(fontsize=7)
    figure.suptitle(_facts(run), fontsize=9)
    figure.savefig(path, dpi=110)
