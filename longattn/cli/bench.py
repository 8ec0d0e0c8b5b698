"""`longattn bench`: longattn beside its peers on this machine, checked, then timed; JSON, PNG and tables."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from longattn.bench.cases import DTYPES, QUICK_SHAPES, SHAPES, Case, parse_case
from longattn.bench.compare import FORWARD, Method, compare
from longattn.bench.kernels import QUICK_SIZES, SIZES, measure_kernels
from longattn.bench.machine import ceilings, load_average, machine_facts
from longattn.bench.memory import measure
from longattn.bench.peers import peers_for
from longattn.bench.report import Run, tables, write_json
from longattn.bench.rope import QUICK_ROPE, ROPE, compare_rope
from longattn.bench.scaling import GRID, QUICK_GRID, fits, measure_scaling
from longattn.bench.timing import Clock
from longattn.cli.console import table_console
from longattn.ops import dispatch

__all__ = ["bench"]

CPU_SHAPES, CPU_PEERS = SHAPES[:2], ["flex attention", "sdpa, dense mask"]
LONG, QUICK_LONG = "B1 H2 S262144 D64 W512", "B1 H2 S2048 D64 W64"  # whose memory is measured
WIDTH = 160  # of a table that goes to a file or a pipe
Say = Callable[[str], None]


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes, float32 unless --dtype says more.")] = False,
    scaling: Annotated[bool, typer.Option("--scaling", help="Fit the growth of time and memory over S and W.")] = False,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="The compiled CPU kernels beside this machine's ceilings, then two peers.")
    ] = False,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, ...; may be repeated.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help=f"As {SHAPES[0]!r} or {SHAPES[3]!r}; may be repeated.")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Only this peer, beside longattn; may be repeated.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every call. (default: torch's)")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Samples of each call. (default: 7, quick 3)")] = None,
    budget: Annotated[float, typer.Option(help="Seconds after which a call sits out rounds beyond its third.")] = 2.0,
    clock: Annotated[Clock, typer.Option(help="Wall-clock time, or all threads' processor time.")] = "wall",
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each peer in a process of its own.")] = True,
    rope: Annotated[bool, typer.Option(help="Measure the rotary embedding too.")] = True,
    out: Annotated[Path, typer.Option(help="Where JSON and PNG go.")] = Path("longattn-bench"),
) -> None:
    """Measure longattn beside its peers on this machine.

    Every peer's result is checked against float64 before it is timed. All run in turns in one process on the same
    threads; a ratio is a peer's median over longattn's. With --scaling, only growth is measured.
    """
    if cpu and dispatch.compiled_module() is None:
        raise typer.BadParameter("--cpu needs the compiled module: `longattn doctor` says why there is none")
    if threads is not None:
        torch.set_num_threads(threads)
    peer = peer or (CPU_PEERS if cpu and not quick else [])
    default_shapes = QUICK_SHAPES if quick else CPU_SHAPES if cpu else SHAPES
    dtypes = dtype or (["float32"] if quick or scaling else ["float32", "bfloat16"])
    rounds = rounds or (3 if quick else 7)
    try:
        cases = [parse_case(text, name) for name in dtypes for text in shape or default_shapes]
        for case in cases:
            peers_for(case.pattern, peer)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console, progress = table_console(WIDTH), Console(stderr=True)
    run = Run(" ".join(["longattn", *sys.argv[1:]]), machine_facts(), clock, load_average())
    with progress.status("starting", refresh_per_second=2) as status:
        run.ceilings = ceilings([DTYPES[name] for name in dtypes], rounds=rounds, clock=clock)
        if scaling:
            for name in dtypes:
                grid = QUICK_GRID if quick else GRID
                points = measure_scaling(
                    grid, name, rounds=min(rounds, 5), memory=memory, clock=clock, say=status.update
                )
                run.points += points
                run.fits += fits(points)
        else:
            if cpu:
                _kernels(run, quick, rounds, memory, status.update)
            _compare(run, cases, peer, rounds, budget, memory, status.update)
            if rope:
                where = QUICK_ROPE if quick else ROPE
                for name in dtypes:
                    status.update(f"rotary embedding, {name}")
                    method = Method(rounds, budget, clock, works=(FORWARD,))
                    run.rope += compare_rope(where, DTYPES[name], method, compiled=not quick)
    run.load_after = load_average()
    for table in tables(run):
        console.print(table, soft_wrap=isinstance(table, str))
    _write(run, out, console)


def _kernels(run: Run, quick: bool, rounds: int, memory: bool, say: Say) -> None:
    counts = sorted({1, torch.get_num_threads()})
    sizes = QUICK_SIZES if quick else SIZES
    run.kernels, found = measure_kernels(sizes, threads=counts, rounds=rounds, clock=run.clock, say=say)
    run.ceilings = {**run.ceilings, **found}
    for name in ("float32", "bfloat16") if memory else ():
        case = parse_case(QUICK_LONG if quick else LONG, name)
        say(f"memory of {case.shape}")
        run.memory.append(measure(case, peers_for(case.pattern)[0]))


def _compare(
    run: Run, cases: list[Case], names: list[str] | None, rounds: int, budget: float, memory: bool, say: Say
) -> None:
    method = Method(rounds, budget, run.clock, say=say)
    for case in cases:
        run.attention += compare(case, peers_for(case.pattern, names), method)
    for case in cases[:1] if memory else []:
        for peer in peers_for(case.pattern, names):
            say(f"memory of {peer.name}")
            run.memory.append(measure(case, peer))


def _write(run: Run, out: Path, console: Console) -> None:
    """JSON, and a PNG where matplotlib is installed, named after what was measured and the day."""
    out.mkdir(parents=True, exist_ok=True)
    kind = "scaling" if run.points else "kernels" if run.kernels else "cpu"
    stem = out / f"{kind}-{run.machine['date'][:10]}"
    write_json(run, stem.with_suffix(".json"))
    console.print(f"wrote {stem.with_suffix('.json')}", soft_wrap=True)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        console.print("no plot: this needs matplotlib: pip install 'longattn[plot]'")
        return
    from longattn.bench.plots import plot_comparison, plot_kernels, plot_scaling

    plot = {"scaling": plot_scaling, "kernels": plot_kernels, "cpu": plot_comparison}[kind]
    plot(run, stem.with_suffix(".png"))
    console.print(f"wrote {stem.with_suffix('.png')}", soft_wrap=True)
