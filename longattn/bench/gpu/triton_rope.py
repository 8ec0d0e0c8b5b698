"""The rotary embedding as Triton users write it (Liger's shape): a program takes one token, with all of its heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["rotation"]

Pair = tuple[Tensor, Tensor]


@triton.jit
def _rotate_heads(
    source, target, cos, sin, source_head, target_head, heads, HALF: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    exists = head < heads
    first = tl.load(source + head * source_head + column, mask=exists).to(tl.float32)
    second = tl.load(source + head * source_head + column + HALF, mask=exists).to(tl.float32)
    out = target + head * target_head + column
    tl.store(out, (first * cos - second * sin).to(target.dtype.element_ty), mask=exists)
    tl.store(out + HALF, (second * cos + first * sin).to(target.dtype.element_ty), mask=exists)


@triton.jit
def _rotate(
    query, key, query_out, key_out, cos, sin, tokens, sign,
    qb, qh, qs, kb, kh, ks, qob, qoh, qos, kob, koh, kos, query_heads, key_heads,
    HALF: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // tokens, program % tokens
    column = tl.arange(0, HALF)
    c = tl.load(cos + token * HALF + column)[None, :]
    s = tl.load(sin + token * HALF + column)[None, :] * sign
    source, target = query + batch * qb + token * qs, query_out + batch * qob + token * qos
    _rotate_heads(source, target, c, s, qh, qoh, query_heads, HALF, QUERY_HEADS)
    source, target = key + batch * kb + token * ks, key_out + batch * kob + token * kos
    _rotate_heads(source, target, c, s, kh, koh, key_heads, HALF, KEY_HEADS)


def _run(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Pair:
    outs = torch.empty_like(query), torch.empty_like(key)  # in their order of strides
    strides = [x.stride(dim) for x in (query, key, *outs) for dim in range(3)]
    heads = query.shape[1], key.shape[1]
    _rotate[(query.shape[0] * query.shape[2],)](
        query, key, *outs, cos, sin, query.shape[2], sign, *strides, *heads,
        HALF=cos.shape[-1], QUERY_HEADS=triton.next_power_of_2(heads[0]), KEY_HEADS=triton.next_power_of_2(heads[1]),
    )  # fmt: skip
    return outs


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        ctx.save_for_backward(cos, sin)
        return _run(query, key, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_run(grad_query, grad_key, cos, sin, -1.0), None, None


def rotation(cos: Tensor, sin: Tensor) -> Callable[[Tensor, Tensor], Pair]:
    """Rotates (B, H, S, D) by half-split tables (S, D / 2), D a power of two."""
    return lambda query, key: _Rotation.apply(query, key, cos.contiguous(), sin.contiguous())
