"""The float64 attention every peer is held to, written from the patterns' definitions, sharing no code with the ops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longattn.bench.cases import Case
from longattn.pattern import Pattern

__all__ = ["NAMES", "Pairs", "Results", "bounds", "dense_results", "picked"]

NAMES = ("out", "grad_query", "grad_key", "grad_value")
FLOOR = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
ROWS = 256  # queries of a block: bounds the logits that are held
Results = tuple[Tensor, ...]  # out, then the gradients of query, key and value: (pairs, heads of a pair, S, D) each
Pairs = Sequence[tuple[int, int]]  # batch rows and key heads


def first_seen(pattern: Pattern, positions: Tensor, head: int, num_heads: int) -> Tensor:
    """The first key of the interval that ends at each position: positions (rows,) -> (rows,)."""
    if pattern.kind == "full":
        return torch.zeros_like(positions)
    if pattern.kind == "window":
        return (positions - pattern.size + 1).clamp_(min=0)
    shift = pattern.shift if head >= num_heads // 2 else 0
    return ((positions + shift) // pattern.size * pattern.size - shift).clamp_(min=0)


def picked(x: Tensor, case: Case, rows: Pairs | None = None) -> Tensor:
    """Those parts of a (B, H or K, S, D) tensor that belong to `rows`: (pairs, H / K or 1, S, D)."""
    parts = x.unflatten(1, (case.kv_heads, -1))  # (B, K, H / K or 1, S, D)
    if rows is None:
        return parts.flatten(0, 1)
    return torch.stack([parts[batch, kv] for batch, kv in rows])


def dense_results(
    case: Case, inputs: tuple[Tensor, ...], *, dtype: torch.dtype = torch.float64, rows: Pairs | None = None
) -> Results:
    """Output and gradients by matmul, softmax, matmul in `dtype`, of inputs as `Case.inputs` makes them.

    Args:
        rows: (batch row, key head) pairs to compute, in the order of `picked`; all by default.
    """
    pairs = rows or [(batch, kv) for batch in range(case.batch) for kv in range(case.kv_heads)]
    whole = [picked(x.detach(), case, rows) for x in inputs]
    results = tuple(torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (whole[0], *whole[:3]))
    group = case.heads // case.kv_heads
    for place, (_, kv) in enumerate(pairs):
        key, value = whole[1][place, 0].to(dtype), whole[2][place, 0].to(dtype)
        for member in range(group):
            query, grad = whole[0][place, member].to(dtype), whole[3][place, member].to(dtype)
            targets = results[0][place, member], results[1][place, member], results[2][place, 0], results[3][place, 0]
            _head(case, kv * group + member, (query, key, value, grad), targets)
    return results


def _head(case: Case, head: int, inputs: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> None:
    """One head, block of queries by block: results written into `targets`, those of keys and values added."""
    (query, key, value, grad), (out, grad_query, grad_key, grad_value) = inputs, targets
    scale, start = 1 / math.sqrt(case.head_dim), case.tokens - case.num_queries
    for first in range(0, case.num_queries, ROWS):
        block = slice(first, min(first + ROWS, case.num_queries))
        positions = torch.arange(block.start, block.stop, device=query.device) + start
        low = first_seen(case.pattern, positions, head, case.heads)
        numbers = torch.arange(0 if case.pattern.sinks else int(low.min()), int(positions[-1]) + 1, device=query.device)
        seen = (numbers <= positions[:, None]) & ((numbers >= low[:, None]) | (numbers < case.pattern.sinks))
        span = slice(int(numbers[0]), int(numbers[-1]) + 1)
        logits = query[block] @ key[span].T * scale
        weights = torch.softmax(logits.masked_fill_(~seen, -math.inf), -1)
        out[block] = weights @ value[span]
        slopes = grad[block] @ value[span].T
        slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True)) * scale
        grad_query[block] = slopes @ key[span]
        grad_key[span] += slopes.T @ query[block]
        grad_value[span] += weights.T @ grad[block]


def bounds(case: Case, reference: Results, low: Results | None = None) -> tuple[float, ...]:
    """Largest allowed norm of each result's error: twice the dense one's, or rounding of the result itself.

    Args:
        reference: `dense_results` in float64.
        low: the same in the case's dtype; without it the bounds are tighter.
    """
    floor = FLOOR[case.dtype]
    rounding = floor * float(reference[3].square().mean().sqrt())  # what remains where a true gradient is zero
    limits = []
    for name, ref, dense in zip(NAMES, reference, low or reference, strict=True):
        limit = max(2 * float((dense.double() - ref).norm()), floor * float(ref.norm()))
        limits.append(limit if name == "out" else max(limit, rounding * math.sqrt(ref.numel())))
    return tuple(limits)
