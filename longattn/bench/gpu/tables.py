"""What a results file says, in Markdown: a table a kind of cell, troubles below it, then aims and what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import geometric_mean, median
from typing import Any

from longattn.bench.compare import BACKWARD, FORWARD
from longattn.bench.gpu.peers import FLASH, FLEX, WINDOW
from longattn.bench.peers import OURS
from longattn.bench.rope import COPY
from longattn.bench.text import milliseconds

__all__ = ["tables"]

Cells = dict[str, dict[str, Any]]
Entry = dict[str, Any]


def tables(content: dict[str, Any]) -> Iterator[str]:
    """Lines to print. A ratio is a peer's median over longattn's: above 1 longattn is faster. Empty: not measured."""
    machine, cells = content["machine"], content["cells"]
    ceilings = _ceilings(content)
    yield f"{machine['device']}, driver {machine['driver']}, torch {machine['torch']}, commit {machine['commit']}"
    yield ", ".join(f"{name}: {rate:,.0f}" for name, rate in ceilings.items())
    for what in dict.fromkeys(cell["what"] for cell in cells.values()):
        yield from _table(what, {name: cell for name, cell in cells.items() if cell["what"] == what}, ceilings)
    yield from _aims(cells, ceilings)


def _ceilings(content: dict[str, Any]) -> dict[str, float]:
    """The median of each rate over the runs that the file holds."""
    runs = content["ceilings"]
    names = [name for name in (runs[0] if runs else ()) if name != "date"]
    return {name: median(run[name] for run in runs) for name in names}


def _name(entry: Entry) -> str:
    return entry.get("peer") or entry["name"]


def _rows(cells: Cells) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Entry]]]:
    """(cell, work, all of the cell, entries by peer)."""
    for name, cell in cells.items():
        for work in dict.fromkeys(entry["work"] for entry in cell["entries"]):
            yield name, work, cell, {_name(e): e for e in cell["entries"] if e["work"] == work}


def _rate(cell: dict[str, Any], ours: Entry, ceilings: dict[str, float]) -> str:
    """longattn's rate and its part of the ceiling that bounds this kind of cell."""
    if ours["median_ms"] is None:
        return ""
    if cell["what"] in ("rope", "decode"):
        rate, ceiling = (
            cell["bytes"] / (1e6 * ours["median_ms"]),
            "copy GB/s" if cell["what"] == "rope" else "read GB/s",
        )
        return f"{rate:,.0f} GB/s, {rate / ceilings[ceiling]:.0%} of {ceiling.split()[0]}"
    rate = ours["gflops"]
    return f"{rate / 1e3:,.0f} TFLOP/s, {rate / ceilings['matmul bfloat16 GFLOP/s']:.0%} of matmul"


def _table(what: str, cells: Cells, ceilings: dict[str, float]) -> Iterator[str]:
    rows = list(_rows(cells))
    peers = list(dict.fromkeys(peer for *_, entries in rows for peer in entries if peer != OURS))
    yield f"\n| {what} | work | longattn ms | rate | {' | '.join(peers)} |"
    yield "|---|---|---|---|" + "---|" * len(peers)
    for name, work, cell, entries in rows:
        ours = entries[OURS]
        time = "" if ours["median_ms"] is None else milliseconds(ours["median_ms"])
        known = [entries[peer]["ratio"] if peer in entries else None for peer in peers]
        texts = ["" if ratio is None else f"{ratio:.2f}" for ratio in known]
        yield f"| {name.partition(' ')[2]} | {work} | {time} | {_rate(cell, ours, ceilings)} | {' | '.join(texts)} |"
    for peer in peers:
        for work in (FORWARD, BACKWARD):
            of_work = [(name, entries[peer]) for name, done, _, entries in rows if done == work and peer in entries]
            ratios = [(float(entry["ratio"]), name) for name, entry in of_work if entry["ratio"]]
            if ratios:
                worst = min(ratios)
                mean = geometric_mean(ratio for ratio, _ in ratios)
                yield f"{peer}, {work}: geometric mean {mean:.2f}, worst {worst[0]:.2f} ({worst[1]})"
    troubles: dict[str, list[str]] = {}
    for name, work, _, entries in rows:
        for peer, entry in entries.items():
            if entry["trouble"]:
                troubles.setdefault(f"{peer}: {entry['trouble']}", []).append(f"{name} {work}")
    for text, places in troubles.items():
        yield f"not timed: {text} ({len(places)} times, first at {places[0]})"


def _aims(cells: Cells, ceilings: dict[str, float]) -> Iterator[str]:
    """The project's aims of which this file holds a cell: the worst that was found beside what is aimed at."""

    def worst(what: str, peer: str, fits: Callable[[str, Entry], bool] = lambda name, entry: True) -> float | None:
        found = [
            entries[peer]["ratio"]
            for name, _, _, entries in _rows({n: c for n, c in cells.items() if c["what"] == what})
            if peer in entries and entries[peer]["ratio"] and fits(name, entries[peer])
        ]
        return min(found) if found else None

    def narrow(name: str, entry: Entry) -> bool:
        return int(name.rpartition("W")[2]) <= 1024

    aims: list[tuple[str, float | None, float]] = [
        (f"windows: {FLASH} over longattn", worst("window", FLASH), 1.0),
        (f"windows up to 1024: {FLEX} over longattn", worst("window", FLEX, narrow), 1.2),
        ("shifted groups: the window of the same area over them", worst("group", WINDOW), 1 / 1.05),
        ("rotary embedding: a plain copy's time over it", worst("rope", COPY), 0.9),
    ]
    for name, _, cell, entries in _rows({n: c for n, c in cells.items() if c["what"] == "decode"}):
        ms = entries[OURS]["median_ms"]
        if ms is None:
            continue
        if cell["bytes"] > 256e6:
            aims.append((f"{name}: part of the read rate", cell["bytes"] / (1e6 * ms) / ceilings["read GB/s"], 0.8))
        else:
            aims.append((f"{name}: 8 us over its time", 0.008 / ms, 1.0))
    known = [(text, found, aim) for text, found, aim in aims if found is not None]
    if known:
        yield "\n| aim | found, worst | aimed at | |\n|---|---|---|---|"
    for text, found, aim in known:
        yield f"| {text} | {found:.2f} | {aim:.2f} | {'met' if found >= aim else 'missed'} |"
