"""Rotary embedding beside transformers': apply_rope compiled and pure, rotate_half eager and compiled, a plain copy.

On a GPU beside a Triton kernel too, and backward as well as forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

import longattn
from longattn.bench.compare import FORWARD, Method
from longattn.bench.text import first_line
from longattn.bench.timing import Call, Sample, interleave, median_ms

__all__ = ["COPY", "QUICK_ROPE", "ROPE", "RopeEntry", "RopeShape", "compare_rope"]

FLOOR = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
COPY = "copy (no rotation)"
Pair = tuple[Tensor, Tensor]
Rotate = Callable[[Tensor, Tensor], Pair]


@dataclass(frozen=True)
class RopeShape:
    """Query (1, heads, tokens, head_dim), key with kv_heads."""

    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    device: str = "cpu"

    @property
    def elements(self) -> int:
        """Of query and key together."""
        return (self.heads + self.kv_heads) * self.tokens * self.head_dim

    def pair(self, seed: int, dtype: torch.dtype, token_major: bool) -> Pair:
        """Normal query and key."""
        generator = torch.Generator(self.device).manual_seed(seed)
        made = []
        for heads in (self.heads, self.kv_heads):
            sizes = (self.tokens, heads) if token_major else (heads, self.tokens)
            x = torch.randn(1, *sizes, self.head_dim, generator=generator, device=self.device).to(dtype)
            made.append(x.transpose(1, 2) if token_major else x)
        return made[0], made[1]


ROPE = RopeShape(32, 8, 4096, 128)
QUICK_ROPE = RopeShape(8, 2, 512, 128)


@dataclass
class RopeEntry:
    """What was found of one way to rotate; the ratio is over longattn as it comes (compiled where it was built)."""

    shape: str
    dtype: str
    name: str
    work: str = FORWARD
    trouble: str = ""
    error: float | None = None
    samples: list[Sample] = field(default_factory=list)
    median_ms: float | None = None
    ratio: float | None = None


def compare_rope(shape: RopeShape, dtype: torch.dtype, method: Method, *, compiled: bool) -> list[RopeEntry]:
    """Check every way against float64, then time those that are right in turns.

    Args:
        compiled: whether torch.compile of transformers' function takes part.
    """
    torch.compiler.reset()
    sets = [shape.pair(seed, dtype, method.token_major) for seed in range(method.sets)]
    grads = shape.pair(method.sets, dtype, method.token_major)
    inv_freq, scaling = longattn.rope_frequencies({"rope_type": "default", "rope_theta": 10000.0}, shape.head_dim)
    positions = torch.arange(shape.tokens, device=shape.device)
    cos, sin = longattn.rope_cos_sin(positions, inv_freq.to(shape.device), scaling, dtype=torch.float64)
    text = f"Hq{shape.heads} Hkv{shape.kv_heads} S{shape.tokens} D{shape.head_dim}"
    ways = _ways(cos.float(), sin.float(), inv_freq.to(shape.device), dtype, compiled)
    entries: list[RopeEntry] = []
    for work in method.works:
        inputs, sign = (sets[0], sin) if work == FORWARD else (grads, -sin)
        exact = [_exact(x, cos, sign) for x in inputs]
        found = {name: RopeEntry(text, str(dtype).removeprefix("torch."), name, work) for name in ways}
        ready: dict[str, Call] = {}
        for name, make in ways.items():
            try:
                call = _call(make(), sets, grads, work)
                got = call()
            except Exception as error:
                found[name].trouble = f"{'not here: ' * isinstance(error, ImportError)}{first_line(error)}"
                continue
            if name != COPY:
                _judge(found[name], got, exact, dtype)
            if not found[name].trouble:
                ready[name] = call
        del exact
        samples = interleave(ready, rounds=method.rounds, budget_s=method.budget_s, take=method.take)
        medians = {name: median_ms(taken, method.clock) for name, taken in samples.items()}
        for name, taken in samples.items():
            found[name].samples, found[name].median_ms = taken, medians[name]
            if "longattn" in medians:
                found[name].ratio = medians[name] / medians["longattn"]
        entries += found.values()
    return entries


def _call(rotate: Rotate, sets: Sequence[Pair], grads: Pair, work: str) -> Callable[[], Pair]:
    """The next set of inputs at each call; a backward alone starts from outputs that are made before."""
    turn = count()
    leaves = [[x.detach().requires_grad_() for x in pair] for pair in sets]
    outs = [rotate(*each) for each in leaves] if work != FORWARD else []

    def call() -> Pair:
        at = next(turn) % len(sets)
        if work == FORWARD:
            with torch.no_grad():
                return rotate(*sets[at])
        query, key = torch.autograd.grad(outs[at], leaves[at], grads, retain_graph=True)
        return query, key

    return call


def _exact(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _judge(entry: RopeEntry, got: Pair, exact: list[Tensor], dtype: torch.dtype) -> None:
    """One error norm over query and key; transformers rounds its tables to the input's dtype, hence 2 floors."""
    total = sum(float((x.double() - ref).square().sum()) for x, ref in zip(got, exact, strict=True)) ** 0.5
    entry.error = total / sum(float(ref.square().sum()) for ref in exact) ** 0.5
    if not entry.error <= 2 * FLOOR[dtype]:
        entry.trouble = f"wrong: error is {entry.error:.1e}, above {2 * FLOOR[dtype]:.1e}"


def _ways(
    cos: Tensor, sin: Tensor, inv_freq: Tensor, dtype: torch.dtype, compiled: bool
) -> dict[str, Callable[[], Rotate]]:
    def plain() -> Rotate:
        return lambda query, key: longattn.apply_rope(query, key, cos, sin)

    def pure() -> Rotate:
        def rotate(query: Tensor, key: Tensor) -> Pair:
            with longattn.force("pure"):
                return longattn.apply_rope(query, key, cos, sin)

        return rotate

    def transformers(compile: bool) -> Rotate:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        wide = [torch.cat([x, x], -1)[None].to(dtype) for x in (cos, sin)]  # (1, S, D)
        rotate = torch.compile(apply_rotary_pos_emb, dynamic=False) if compile else apply_rotary_pos_emb
        return lambda query, key: rotate(query, key, *wide)

    def triton() -> Rotate:
        from longattn.bench.gpu.triton_rope import rotation

        return rotation(cos, sin)

    def copy() -> Rotate:
        return lambda query, key: (query.clone(), key.clone())

    def formed() -> Rotate:
        positions = torch.arange(len(cos), device=cos.device)
        return lambda query, key: longattn.apply_rope_positions(query, key, positions, inv_freq)

    ways: dict[str, Callable[[], Rotate]] = {"longattn": plain, "longattn, phases formed inside": formed}
    if cos.device.type == "cpu":  # on a GPU autograd's threads do not see that it is forced
        ways["longattn, pure"] = pure
    ways["transformers, eager"] = lambda: transformers(False)
    if compiled:
        ways["transformers, torch.compile"] = lambda: transformers(True)
    if cos.device.type == "cuda":
        ways["one Triton program a token"] = triton
    return {**ways, COPY: copy}
