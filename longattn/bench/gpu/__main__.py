"""`python -m longattn.bench.gpu STAGE`: measures the cells of a stage that the results file lacks, then prints it.

Ends in time: a cell is not begun where it would not fit into what is left of `--seconds`; run the same again for the
rest. benchmarks/gpu.sh is the way in.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from longattn.bench.gpu.cells import FULL_SIZE, TINY, cells
from longattn.bench.gpu.measure import Bench
from longattn.bench.gpu.record import Record
from longattn.bench.gpu.tables import tables
from longattn.bench.machine import gpu_facts

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """The number of cells that remain, at most 125."""
    parser = argparse.ArgumentParser(prog="python -m longattn.bench.gpu", description=__doc__)
    parser.add_argument("stage", choices=["core", "grid", "table"])
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="K", help="leave out the cells before")
    parser.add_argument("--out", type=Path, default=Path("longattn-bench"), help="where the results file lies")
    parser.add_argument("--seconds", type=float, default=450.0, help="begin no cell that would end later")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny cells, to try this out")
    options = parser.parse_args(arguments)
    record = Record(options.out, gpu_facts(options.device))
    remain = 0 if options.stage == "table" else _measure(record, options)
    print("\n".join(tables(record.content)))
    print(f"\n{record.path}: {len(record.cells)} cells" + (f", {remain} remain: run this again" if remain else ""))
    return min(remain, 125)


def _measure(record: Record, options: argparse.Namespace) -> int:
    begin = time.monotonic()

    def left() -> float:
        return options.seconds - (time.monotonic() - begin)

    def say(text: str) -> None:
        print(f"[{options.seconds - left():4.0f} s] {text}", file=sys.stderr, flush=True)

    bench = Bench(options.device, options.stage, say)
    wanted = cells(options.stage, FULL_SIZE if options.device == "cuda" else TINY, options.device)[options.first :]
    waiting = [cell for cell in wanted if cell.name not in record.cells]
    if waiting:
        say("ceilings")
        record.add_ceilings(bench.ceilings())
    longest = 0.0
    while waiting and left() > longest:
        cell, start = waiting[0], left()
        say(cell.name)
        record.add(cell.name, bench.cell(cell))
        waiting.pop(0)
        longest = max(longest, start - left())
    return len(waiting)


if __name__ == "__main__":
    raise SystemExit(main())
