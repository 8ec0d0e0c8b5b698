"""The float64 dense attention and the tolerance that every attention test and benchmark is held to.

Written from the definitions alone (band, sinks, rows, documents), one query at a time where that is plainest, and shares no
code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def visible_mask(
    batch: int,
    num_heads: int,
    sq: int,
    sk: int,
    *,
    window: tuple[int, int] | None = None,
    group: int | None = None,
    shifts: Sequence[int] | None = None,
    causal: bool = True,
    sinks: int = 0,
    cu_seqlens: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    query_start: int | None = None,
    key_start: int = 0,
) -> Tensor:
    """Which key each query sees: bool (batch, num_heads, sq, sk)."""
    mask = torch.zeros(batch, num_heads, sq, sk, dtype=torch.bool)
    keys = key_start + torch.arange(sk)
    for b in range(batch):
        end = int(kv_end[b]) if kv_end is not None else None
        first = int(kv_start[b]) if kv_start is not None else 0
        for i in range(sq):
            if query_start is not None:
                position = query_start + i
            else:
                position = i + (end if end is not None else sk) - sq
            start, stop = first, math.inf
            if cu_seqlens is not None:
                bounds = cu_seqlens.tolist()
                start, stop = max((a, z) for a, z in zip(bounds, bounds[1:], strict=False) if a <= position < z)
            real = (keys >= start) & (keys < stop) & (keys < (end if end is not None else math.inf))
            if position < start:
                continue
            p, j = position - start, keys - start
            for h in range(num_heads):
                if window is not None:
                    low = j >= p - window[0] if window[0] >= 0 else torch.ones_like(real)
                    high = j <= p + window[1] if window[1] >= 0 else torch.ones_like(real)
                else:
                    shift = shifts[h] if shifts is not None else 0
                    begin = (p + shift) // group * group - shift
                    low = j >= begin
                    high = j <= (p if causal else begin + group - 1)
                mask[b, h, i] = real & high & (low | (j < sinks))
    return mask


def half_shifts(num_heads: int, shift: int) -> list[int]:
    """The shift of each head when the second half of them is shifted."""
    return [shift if head >= num_heads // 2 else 0 for head in range(num_heads)]


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Dense attention in `dtype`: (out (B, Hq, Sq, D), lse (B, Hq, Sq)); rows that see nothing give 0 and their sink logit."""
    q, k, v = (x.to(dtype) for x in (query, key, value))
    group = q.shape[1] // max(1, k.shape[1])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = q @ k.transpose(-1, -2) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -math.inf)
    if sink_logits is not None:
        column = sink_logits.to(dtype)[None, :, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], dim=-1)
    empty = (logits == -math.inf).all(-1)
    safe = logits.masked_fill(empty[..., None], 0.0)
    probabilities = torch.softmax(safe, -1).masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(safe, -1).masked_fill(empty, -math.inf)
    return probabilities[..., : k.shape[2]] @ v, lse


def error(got: Tensor, ref: Tensor) -> float:
    return float((got.double() - ref.double()).norm())


def assert_close(
    name: str,
    got: Tensor,
    ref: Tensor,
    dense_error: float = 0.0,
    *,
    grad_value: Tensor | None = None,
    scale: float = 1.0,
    head_dim: int = 1,
) -> None:
    """Hold `got` to the project's tolerance: max(2 x dense's error, f x norm(ref), and for gradients a rounding floor).

    `dense_error` is the error of the same maths done densely in the input dtype. Where the true gradient is zero,
    `grad_value` (the float64 gradient of the values) sets the size that rounding may have.
    """
    assert got.shape == ref.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(ref.shape)}"
    assert not torch.isnan(got).any(), f"{name}: NaN"
    infinite = torch.isinf(ref)
    assert torch.equal(torch.isinf(got), infinite), f"{name}: infinities differ"
    got, ref = got.masked_fill(infinite, 0.0), ref.masked_fill(infinite, 0.0)
    floor = FLOOR[got.dtype]
    bound = max(2 * dense_error, floor * float(ref.double().norm()))
    if grad_value is not None and grad_value.numel():
        rms = float(grad_value.double().square().mean().sqrt())
        bound = max(bound, floor * max(1.0, scale * math.sqrt(head_dim)) * rms * math.sqrt(got.numel()))
    found = error(got, ref)
    assert found <= bound, f"{name}: error {found:.3e} exceeds {bound:.3e} ({got.dtype}, norm {float(ref.norm()):.3e})"
