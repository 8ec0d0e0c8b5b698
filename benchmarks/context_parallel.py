"""Window attention over gloo ranks: longattn's halo beside all-gather context parallelism and torch's ring.

`python benchmarks/context_parallel.py --out benchmarks/results` starts the ranks by itself, checks every way against
one process, then measures each length in turns: a forward and backward, and the messages of one without any attention.
Bytes are those of the loopback interface, all ranks together, so that nothing is taken from a formula.

all-gather: keys and values are gathered by torch's functional collectives, whose gradients are reduced and scattered;
the shard's queries then attend by longattn's op to the part in reach. That is how engines serve windows whose context
parallelism gathers.
ring: torch's own `_templated_ring_attention`, the loop under `context_parallel`, with the CPU's SDPA kernel as its op
and head-and-tail shards. It has no windows: its attention is causal over everything, so that only its messages compare.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring

from longattn import distributed, window_attention
from longattn.bench.machine import load_average, machine_facts
from longattn.distributed.attention import WINDOW as PATTERN
from longattn.distributed.call import Call
from longattn.distributed.ops import _rows

HEADS, HEAD_DIM, WINDOW = 2, 64, 512
LENGTHS = (16384, 32768, 65536, 131072, 262144)
RANKS = (2, 4)
MOST_S = 25.0  # a way that would take longer than this for one call is left out
Way = Callable[[Tensor, Tensor, Tensor, Tensor], Any]  # query, key, value, gradient of the output; this rank's shards


def halo(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = distributed.window_attention(*leaves, WINDOW, group=dist.group.WORLD)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def halo_messages(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    name = dist.group.WORLD.group_name
    call = Call(PATTERN, q, k, (WINDOW - 1, 0, [], name, 1.0, 0.0, 0, None, None, None, None))
    exchanges = call.exchanges(q, k)
    rows = _rows(k.new_empty(call.remote_size(q, k)), exchanges, k)
    for exchange, to in zip(exchanges, rows, strict=True):
        exchange.launch(k, v, to, call.group).arrived()
        exchange.launch_back(to, call.group).arrived()


def gathered(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    rank, ranks, length = dist.get_rank(), dist.get_world_size(), k.shape[2]
    whole = _gather(torch.stack([k, v]))
    first = max(0, rank * length - WINDOW + 1)
    key, value = whole[:, :, :, first : (rank + 1) * length]
    options = (WINDOW - 1, 0, HEAD_DIM**-0.5, 0.0, 0, None, None, None, None, rank * length, first)
    out, lse = torch.ops.longattn.window_attention(q, key, value, *options)
    grad_q, *near, _ = torch.ops.longattn.window_attention_bwd(grad, None, q, key, value, out, lse, *options)
    grads = whole.new_zeros(whole.shape)
    grads[:, :, :, first : (rank + 1) * length] = torch.stack(near)
    return out, grad_q, *_scatter(grads, ranks)


def gather_messages(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    _scatter(_gather(torch.stack([k, v])), dist.get_world_size())


def _gather(both: Tensor) -> Tensor:
    return funcol.wait_tensor(funcol.all_gather_tensor(both.movedim(3, 0).contiguous(), 0, dist.group.WORLD)).movedim(
        0, 3
    )


def _scatter(grads: Tensor, ranks: int) -> Tensor:
    rows = grads.movedim(3, 0).contiguous()
    return funcol.wait_tensor(funcol.reduce_scatter_tensor(rows, "sum", 0, dist.group.WORLD)).movedim(0, 3)


def ring(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return _ring(q, k, v, grad, _sdpa, _sdpa_backward)


def ring_messages(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    def no_forward(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return query, query[..., 0]

    def no_backward(*, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return query, key, value

    _ring(q, k, v, grad, no_forward, no_backward)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **options: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal)


def _sdpa_backward(
    *, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = grad_out, query, key, value, out, logsumexp
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, 0.0, is_causal)


def _ring(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, forward: Callable[..., Any], backward: Callable[..., Any]
) -> tuple[Tensor, ...]:
    torch_ring.set_rotate_method("alltoall")
    group = dist.group.WORLD
    out, lse = torch_ring._templated_ring_attention(group, 2, forward, q, k, v, is_causal=True)
    grads = torch_ring._templated_ring_attention_backward(
        group, 2, backward, grad, "grad_out", q, k, v, out, lse, is_causal=True
    )
    return out, *grads[:3]


WAYS: dict[str, tuple[Way, Way]] = {
    "longattn": (halo, halo_messages),
    "all-gather": (gathered, gather_messages),
    "torch's ring, causal": (ring, ring_messages),
}


def inputs(tokens: int, positions: Tensor | slice) -> list[Tensor]:
    """query, key, value and the gradient of the output: the same whole tensors on every rank, this rank's part."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, HEADS, tokens, HEAD_DIM, generator=generator)[:, :, positions].contiguous() for _ in range(4)
    ]


def own(way: str, tokens: int) -> Tensor:
    """Positions of this rank's shard; the ring's are a chunk of the head and one of the tail."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if "ring" in way:
        chunks = torch.arange(tokens).chunk(2 * ranks)
        return torch.cat([chunks[rank], chunks[-1 - rank]])
    return torch.arange(tokens).chunk(ranks)[rank]


def check(way: str, tokens: int = 2048) -> float:
    """The largest relative error of output and gradients over one process in float64."""
    whole = [x.double() for x in inputs(tokens, slice(None))]
    leaves = [x.requires_grad_() for x in whole[:3]]
    expected = window_attention(*leaves, (-1, 0) if "ring" in way else WINDOW)
    results = [expected.detach(), *torch.autograd.grad(expected, leaves, whole[3])]
    places = own(way, tokens)
    got = WAYS[way][0](*inputs(tokens, places))
    errors = [float((a - b[:, :, places]).norm() / b[:, :, places].norm()) for a, b in zip(got, results, strict=True)]
    return max(errors)


def loopback_bytes() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def sample(call: Callable[[], Any]) -> tuple[float, int]:
    """Seconds until all ranks are done, and bytes over the loopback interface meanwhile."""
    dist.barrier()
    bytes_before, start = loopback_bytes(), time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - start, loopback_bytes() - bytes_before


def rank_main(rank: int, ranks: int, store: str, lengths: tuple[int, ...], rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # torch's own ring calls what torch deprecates
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    points: list[dict[str, Any]] = [{"ranks": ranks, "way": way, "relative_error": check(way)} for way in WAYS]
    lasted: dict[tuple[str, str], float] = {}
    for tokens in lengths:
        for part, index in (("messages", 1), ("forward and backward", 0)):
            for way, both in WAYS.items():
                point = {"ranks": ranks, "tokens": tokens, "way": way, "part": part}
                expected = lasted.get((way, part), 0.0) * (4 if "ring" in way and index == 0 else 2)
                if expected > MOST_S:
                    points.append(point | {"left_out": f"would take about {expected:.0f} s"})
                    lasted[way, part] = expected
                    continue
                tensors = inputs(tokens, own(way, tokens))
                run = lambda call=both[index], tensors=tensors: call(*tensors)  # noqa: E731
                samples = [sample(run) for _ in range(rounds + 1)]
                samples = samples[1:] if samples[0][0] < MOST_S / 5 else samples[:1]  # the first one warms up
                decided = torch.tensor([median(seconds for seconds, _ in samples)], dtype=torch.float64)
                dist.broadcast(decided, 0)
                lasted[way, part] = float(decided)
                points.append(point | {"seconds": [s for s, _ in samples], "loopback_bytes": [b for _, b in samples]})
    if rank == 0:
        results.put(points)
    dist.barrier()
    dist.destroy_process_group()


def measure(lengths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Points of all numbers of ranks."""
    context, points = multiprocessing.get_context("spawn"), []
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            results = context.Queue()
            arguments = (ranks, str(Path(folder) / "store"), lengths, rounds, results)
            processes = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(ranks)]
            for process in processes:
                process.start()
            points += results.get()
            for process in processes:
                process.join()
    return points


def plot(points: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """A row a number of ranks: bytes, seconds of messages alone, seconds of a forward and backward, over the length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4 * len(RANKS)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [
        ("bytes over the loopback, all ranks", "messages", "loopback_bytes"),
        ("seconds, messages alone", "messages", "seconds"),
        ("seconds, forward and backward", "forward and backward", "seconds"),
    ]
    for row, axes in zip(RANKS, figure.subplots(len(RANKS), len(panels), squeeze=False), strict=True):
        for axis, (title, part, field) in zip(axes, panels, strict=True):
            for way in WAYS:
                found = [p for p in points if (p["ranks"], p["way"], p.get("part")) == (row, way, part) and field in p]
                axis.plot([p["tokens"] for p in found], [median(p[field]) for p in found], marker="o", label=way)
            axis.set(xscale="log", yscale="log", title=f"{row} ranks: {title}", xlabel="tokens")
            axis.set_xscale("log", base=2)
            axis.legend(fontsize=7)
    figure.suptitle(f"{HEADS} heads of {HEAD_DIM}, window {WINDOW}, float32; {machine['cpu']}, {machine['date'][:10]}")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Context parallelism over gloo ranks: halo, all-gather, ring.")
    parser.add_argument("--out", type=Path, default=Path("longattn-bench"), help="where JSON and PNG go")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument("--rounds", type=int, default=3, help="samples of each call")
    options = parser.parse_args()
    machine, before = machine_facts(), load_average()
    points = measure(tuple(options.lengths), options.rounds)
    run = {
        "format": 1,
        "command": " ".join(["python", *sys.argv]),
        "machine": machine | {"threads": 1},
        "load_before": before,
        "load_after": load_average(),
        "shape": {"heads": HEADS, "head_dim": HEAD_DIM, "window": WINDOW, "dtype": "float32"},
        "points": points,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"context-parallel-{machine['date'][:10]}"
    stem.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n")
    plot(points, machine, stem.with_suffix(".png"))
    for point in points:
        text = (
            f"{median(point['seconds']):.3f} s, {median(point['loopback_bytes']):,.0f} bytes"
            if "seconds" in point
            else ""
        )
        print({k: v for k, v in point.items() if k not in ("seconds", "loopback_bytes")}, text)


if __name__ == "__main__":
    main()
