"""The float64 attention every peer is held to, written from the patterns' definitions, sharing no code with the ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longattn.bench.cases import Case
from longattn.pattern import Pattern

__all__ = ["NAMES", "Results", "bounds", "dense_results"]

NAMES = ("out", "grad_query", "grad_key", "grad_value")
FLOOR = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
ROWS = 256  # queries of a block: bounds the logits that are held
Results = tuple[Tensor, ...]  # out, then the gradients of query, key and value


def first_seen(pattern: Pattern, positions: Tensor, head: int, num_heads: int) -> Tensor:
    """The first key of the interval that ends at each position: positions (rows,) -> (rows,)."""
    if pattern.kind == "full":
        return torch.zeros_like(positions)
    if pattern.kind == "window":
        return (positions - pattern.size + 1).clamp_(min=0)
    shift = pattern.shift if head >= num_heads // 2 else 0
    return ((positions + shift) // pattern.size * pattern.size - shift).clamp_(min=0)


def _head(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, head: int, num_heads: int) -> Tensor:
    """One head, block of queries by block: query, key, value and the result (S, D)."""
    outs = []
    for start in range(0, len(query), ROWS):
        rows = torch.arange(start, min(start + ROWS, len(query)))
        low = first_seen(pattern, rows, head, num_heads)
        first, last = 0 if pattern.sinks else int(low.min()), int(rows[-1]) + 1
        keys = torch.arange(first, last)
        seen = (keys <= rows[:, None]) & ((keys >= low[:, None]) | (keys < pattern.sinks))
        logits = query[start : start + ROWS] @ key[first:last].T / math.sqrt(query.shape[-1])
        outs.append(torch.softmax(logits.masked_fill_(~seen, -math.inf), -1) @ value[first:last])
    return torch.cat(outs)


def dense_results(case: Case, inputs: tuple[Tensor, ...], *, dtype: torch.dtype = torch.float64) -> Results:
    """Output and gradients by matmul, softmax, matmul in `dtype`, of inputs as `Case.inputs` makes them."""
    query, key, value, grad = (x.detach().to(dtype) for x in inputs)
    results = tuple(torch.zeros_like(x) for x in (query, query, key, value))
    for b in range(case.batch):
        for h in range(case.heads):
            kv = h // (case.heads // case.kv_heads)
            leaves = [x.clone().requires_grad_() for x in (query[b, h], key[b, kv], value[b, kv])]
            out = _head(leaves[0], leaves[1], leaves[2], case.pattern, h, case.heads)
            results[0][b, h] = out.detach()
            shares = torch.autograd.grad(out, leaves, grad[b, h])
            for total, share, index in zip(results[1:], shares, (h, kv, kv), strict=True):
                total[b, index] += share
    return results


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
