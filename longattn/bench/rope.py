"""Rotary embedding beside transformers': apply_rope compiled and pure, rotate_half eager and compiled, a plain copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import longattn
from longattn.bench.text import first_line
from longattn.bench.timing import Clock, Sample, interleave, median_ms

__all__ = ["QUICK_ROPE", "ROPE", "RopeEntry", "RopeShape", "compare_rope"]

FLOOR = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
COPY = "copy (no rotation)"
Pair = tuple[Tensor, Tensor]
Rotate = Callable[[], Pair]


@dataclass(frozen=True)
class RopeShape:
    """Query (1, heads, tokens, head_dim), key with kv_heads."""

    heads: int
    kv_heads: int
    tokens: int
    head_dim: int


ROPE = RopeShape(32, 8, 4096, 128)
QUICK_ROPE = RopeShape(8, 2, 512, 128)


@dataclass
class RopeEntry:
    """What was found of one way to rotate; the ratio is over longattn as it comes (compiled where it was built)."""

    shape: str
    dtype: str
    name: str
    trouble: str = ""
    error: float | None = None
    samples: list[Sample] = field(default_factory=list)
    median_ms: float | None = None
    ratio: float | None = None


def compare_rope(
    shape: RopeShape, dtype: torch.dtype, *, rounds: int, budget_s: float, clock: Clock = "wall", compiled: bool
) -> list[RopeEntry]:
    """Check every way against float64, then time those that are right in turns.

    Args:
        compiled: whether torch.compile of transformers' function takes part.
    """
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    heads = (shape.heads, shape.kv_heads)
    query, key = (torch.randn(1, n, shape.tokens, shape.head_dim, generator=generator).to(dtype) for n in heads)
    inv_freq, scaling = longattn.rope_frequencies({"rope_type": "default", "rope_theta": 10000.0}, shape.head_dim)
    cos, sin = longattn.rope_cos_sin(torch.arange(shape.tokens), inv_freq, scaling, dtype=torch.float64)
    exact = [_exact(x, cos, sin) for x in (query, key)]
    ways = _ways(query, key, cos.float(), sin.float(), compiled)
    text = f"Hq{shape.heads} Hkv{shape.kv_heads} S{shape.tokens} D{shape.head_dim}"
    entries = {name: RopeEntry(text, str(dtype).removeprefix("torch."), name) for name in ways}
    ready: dict[str, Rotate] = {}
    for name, make in ways.items():
        try:
            call = make()
            got = call()
        except Exception as error:
            entries[name].trouble = first_line(error)
            continue
        ready[name] = call
        if name != COPY:
            _judge(entries[name], got, exact, dtype)
            if entries[name].trouble:
                del ready[name]
    del exact
    samples = interleave(ready, rounds=rounds, budget_s=budget_s)
    medians = {name: median_ms(taken, clock) for name, taken in samples.items()}
    for name, taken in samples.items():
        entries[name].samples, entries[name].median_ms = taken, medians[name]
        if "longattn" in medians:
            entries[name].ratio = medians[name] / medians["longattn"]
    return list(entries.values())


def _exact(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _judge(entry: RopeEntry, got: Pair, exact: list[Tensor], dtype: torch.dtype) -> None:
    """One error norm over query and key; transformers rounds its tables to the input's dtype, hence 2 floors."""
    total = sum(float((x.double() - ref).square().sum()) for x, ref in zip(got, exact, strict=True)) ** 0.5
    entry.error = total / sum(float(ref.square().sum()) for ref in exact) ** 0.5
    if not entry.error <= 2 * FLOOR[dtype]:
        entry.trouble = f"wrong: error is {entry.error:.1e}, above {2 * FLOOR[dtype]:.1e}"


def _ways(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, compiled: bool) -> dict[str, Callable[[], Rotate]]:
    def plain() -> Rotate:
        return partial(longattn.apply_rope, query, key, cos, sin)

    def pure() -> Rotate:
        def call() -> Pair:
            with longattn.force("pure"):
                return longattn.apply_rope(query, key, cos, sin)

        return call

    def transformers(compile: bool) -> Rotate:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        wide = [torch.cat([x, x], -1)[None].to(query.dtype) for x in (cos, sin)]  # (1, S, D)
        rotate = torch.compile(apply_rotary_pos_emb, dynamic=False) if compile else apply_rotary_pos_emb
        return partial(rotate, query, key, *wide)

    def copy() -> Rotate:
        return lambda: (query.clone(), key.clone())

    ways: dict[str, Callable[[], Rotate]] = {"longattn": plain, "longattn, pure": pure}
    ways["transformers, eager"] = partial(transformers, False)
    if compiled:
        ways["transformers, torch.compile"] = partial(transformers, True)
    return {**ways, COPY: copy}
