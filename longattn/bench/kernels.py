"""The compiled CPU kernels beside what this machine can do at most: rates, and their shares of measured ceilings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import longattn
from longattn.bench.cases import DTYPES, Case, parse_case
from longattn.bench.timing import Clock, Sample, interleave, median_ms
from longattn.ops import dispatch

__all__ = ["QUICK_SIZES", "SIZES", "Cell", "Sizes", "measure_kernels"]

READ = "read GB/s"
ROPE_HEADS = (32, 8)  # of query and key
PEAK_ROUNDS = 100_000
BUDGET_S = 4.0
Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Sizes:
    """What is measured: B1 H8 attention of `tokens`, decoding over `decode_tokens`, rotation of 32 and 8 heads."""

    tokens: int = 4096
    windows: tuple[int, ...] = (512, 128)
    head_dims: tuple[int, ...] = (64, 128)
    decode_tokens: int = 65536
    rope_tokens: int = 4096
    stream_bytes: int = 256 << 20  # larger than a last-level cache
    matrix: int = 2048


SIZES = Sizes()
QUICK_SIZES = Sizes(512, (64,), (64,), 2048, 256, 1 << 20, 256)


@dataclass
class Cell:
    """One kernel: its rate, the ceiling it is held to (both in `unit`), and the share that the project aims at."""

    work: str
    shape: str
    dtype: str
    threads: int
    unit: str
    ceiling: str
    goal: float | None = None
    samples: list[Sample] = field(default_factory=list)
    median_ms: float = 0.0
    rate: float = 0.0
    ceiling_rate: float = 0.0
    share: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.work}, {self.shape}, {self.dtype}"


def measure_kernels(
    sizes: Sizes, *, threads: Sequence[int], rounds: int, clock: Clock, say: Callable[[str], None] = lambda text: None
) -> tuple[list[Cell], dict[str, float]]:
    """Time every kernel in turns with the ceilings it is held to, at each number of threads.

    Returns:
        The cells, and the rates of the ceilings, measured again for each group of kernels.
    """
    cells: list[Cell] = []
    found: dict[str, float] = {}
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for name, group in _groups(sizes, count).items():
                say(f"kernels, {count} threads: {name}")
                timed, limits = _time(group(), sizes, count, rounds, clock)
                cells += timed
                found.update({f"{limit} beside {name}, {count} threads": rate for limit, rate in limits.items()})
    finally:
        torch.set_num_threads(before)
    return cells, found


Planned = list[tuple[Cell, float, Callable[[], object]]]  # a cell, its operations or bytes, and its call


def _groups(sizes: Sizes, threads: int) -> dict[str, Callable[[], Planned]]:
    """What is timed in turns with each other: an attention shape in one dtype, decoding, rotation."""
    groups: dict[str, Callable[[], Planned]] = {}
    for dtype in ("float32", "bfloat16", "float16"):
        for dim in sizes.head_dims:
            groups[f"attention {dtype} D{dim}"] = lambda dtype=dtype, dim=dim: _attention(  # type: ignore[misc]
                sizes, dtype, dim, threads
            )
        groups[f"decoding {dtype}"] = lambda dtype=dtype: _decoding(sizes, dtype, threads)  # type: ignore[misc]
    for dtype in ("float32", "bfloat16"):
        groups[f"rotation {dtype}"] = lambda dtype=dtype: _rotation(sizes, dtype, threads)  # type: ignore[misc]
    return groups


def _time(
    planned: Planned, sizes: Sizes, threads: int, rounds: int, clock: Clock
) -> tuple[list[Cell], dict[str, float]]:
    names = dict.fromkeys(cell.ceiling for cell, _, _ in planned)
    limits = {name: _ceiling(name, sizes, threads) for name in (*names, *_matmul(planned))}
    calls: Calls = {cell.name: call for cell, _, call in planned}
    calls.update({name: call for name, (call, _) in limits.items()})
    for call in calls.values():
        call()
    samples = interleave(calls, rounds=rounds, budget_s=BUDGET_S)
    rates = {name: work / (1e6 * median_ms(samples[name], clock)) for name, (_, work) in limits.items()}
    for cell, work, _ in planned:
        cell.samples, cell.median_ms = samples[cell.name], median_ms(samples[cell.name], clock)
        cell.rate, cell.ceiling_rate = work / (1e6 * cell.median_ms), rates[cell.ceiling]
        cell.share = cell.rate / cell.ceiling_rate
    return [cell for cell, _, _ in planned], rates


def _matmul(planned: Planned) -> list[str]:
    """The large matrix product beside the register peak of the same dtype.

    Products of float16 are float32's in the kernels; where the processor has none, torch's own take seconds.
    """
    dtypes = [cell.dtype for cell, _, _ in planned if cell.unit == "GFLOP/s"]
    dtypes = ["float32" if dtype == "float16" else dtype for dtype in dtypes]
    return [f"matmul {dtypes[0]} GFLOP/s"] if dtypes else []


def _ceiling(name: str, sizes: Sizes, threads: int) -> tuple[Callable[[], object], float]:
    """A call, and the operations or bytes that it stands for."""
    kind, *rest = name.split()
    if kind == "registers":
        module = dispatch.compiled_module()
        assert module is not None
        operations = module.cpu_peak(rest[0], PEAK_ROUNDS, threads)
        return lambda: module.cpu_peak(rest[0], PEAK_ROUNDS, threads), operations
    if kind == "matmul":
        matrix = torch.randn(sizes.matrix, sizes.matrix).to(DTYPES[rest[0]])
        return lambda: matrix @ matrix, 2.0 * sizes.matrix**3
    if name == READ:
        return torch.ones(sizes.stream_bytes // 4).sum, sizes.stream_bytes
    source = torch.ones(1, sum(ROPE_HEADS), sizes.rope_tokens, 128, dtype=DTYPES[rest[0]])
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * source.numel() * source.itemsize


def _cell(case: Case, work: str, threads: int, goal: float | None) -> Cell:
    ceiling = f"registers {case.dtype_name} GFLOP/s"
    return Cell(work, case.shape, case.dtype_name, threads, "GFLOP/s", ceiling, goal)


def _attention(sizes: Sizes, dtype: str, dim: int, threads: int) -> Planned:
    """Forward, and the backward's five products alone, in windows and in shifted groups of about the same area."""
    planned: Planned = []
    texts = [f"W{window}" for window in sizes.windows] + [f"G{2 * sizes.windows[0]}+shift"]
    for text in texts:
        case = parse_case(f"B1 H8 S{sizes.tokens} D{dim} {text}", dtype)
        query, key, value, grad = case.inputs()
        narrow = text == f"W{sizes.windows[-1]}" and len(sizes.windows) > 1
        goal = {"float32": 0.6 if narrow else 0.75, "bfloat16": 0.5 if narrow else 0.7}.get(dtype)
        plain = (query, key, value)
        planned.append((_cell(case, "forward", threads, goal), case.flops, _forward(case, plain)))
        backward = _cell(case, "backward", threads, None if narrow else 0.6)
        planned.append((backward, 2.5 * case.flops, _backward(case, plain, grad)))
    return planned


def _forward(case: Case, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return case.pattern.attend(*inputs)

    return call


def _backward(case: Case, inputs: tuple[Tensor, ...], grad: Tensor) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = case.pattern.attend(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _decoding(sizes: Sizes, dtype: str, threads: int) -> Planned:
    """One query a head over keys and values larger than the last-level cache, held to a read-only sum."""
    planned: Planned = []
    for heads in (8, 32):
        tokens, element = sizes.decode_tokens, DTYPES[dtype]
        query = torch.randn(1, heads, 1, 128).to(element)
        key, value = (torch.randn(1, 8, tokens, 128).to(element) for _ in range(2))
        cell = Cell("decode", f"H{heads} K8 S{tokens} D128", dtype, threads, "GB/s", READ, 0.9)
        call = _attend(query, key, value)
        planned.append((cell, 2.0 * key.numel() * key.itemsize, call))
    return planned


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], object]:
    return lambda: longattn.window_attention(query, key, value, (-1, 0))


def _rotation(sizes: Sizes, dtype: str, threads: int) -> Planned:
    """Query and key in one call, held to a copy of the same bytes: 1.1 times its time, so 1 / 1.1 of its rate."""
    query, key = (torch.randn(1, heads, sizes.rope_tokens, 128).to(DTYPES[dtype]) for heads in ROPE_HEADS)
    inv_freq, scaling = longattn.rope_frequencies({"rope_type": "default", "rope_theta": 10000.0}, 128)
    tables = longattn.rope_cos_sin(torch.arange(sizes.rope_tokens), inv_freq, scaling)
    outs = torch.empty_like(query), torch.empty_like(key)
    run = torch.ops.longattn._rope_fwd.default
    moved = 2.0 * sum(x.numel() * x.itemsize for x in (query, key))
    ways: dict[str, tuple[Any, ...]] = {
        "rotate": (query, key, *tables, False, False, *outs),
        "rotate back": (query, key, *tables, False, True, *outs),
        "rotate in place": (query, key, *tables, False, False, query, key),
        "rotate back in place": (query, key, *tables, False, True, query, key),
        "rotate interleaved": (query, key, *tables, True, False, *outs),
    }
    shape = f"H32 K8 S{sizes.rope_tokens} D128"
    return [
        (Cell(way, shape, dtype, threads, "GB/s", f"copy {dtype} GB/s", 1 / 1.1), moved, lambda args=args: run(*args))  # type: ignore[misc]
        for way, args in ways.items()
    ]
