"""Grouped attention, shifted for half of the heads: the public function and what makes its op grouped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from longattn.ops import dispatch
from longattn.ops.attention import Bands, define_attention, options
from longattn.ops.band import GroupBand
from longattn.ops.checks import check_count
from longattn.ops.compiled import why_not_compiled
from longattn.ops.hopper import kernel_note

__all__ = ["group_attention"]

OP = "group_attention"


@overload
def group_attention(
    query: Tensor, key: Tensor, value: Tensor, group_size: int, *, shift: int = ..., causal: bool = ...,
    scale: float | None = ..., softcap: float = ..., sink_tokens: int = ..., sink_logits: Tensor | None = ...,
    cu_seqlens: Tensor | None = ..., kv_start: Tensor | None = ..., kv_end: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def group_attention(
    query: Tensor, key: Tensor, value: Tensor, group_size: int, *, shift: int = ..., causal: bool = ...,
    scale: float | None = ..., softcap: float = ..., sink_tokens: int = ..., sink_logits: Tensor | None = ...,
    cu_seqlens: Tensor | None = ..., kv_start: Tensor | None = ..., kv_end: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_size: int,
    *,
    shift: int = 0,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_tokens: int = 0,
    sink_logits: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within groups of tokens, whose borders lie `shift` tokens earlier for the second half of the heads.

    A query at position p of head h sees the keys from floor((p + s_h) / G) G - s_h up to itself (causal) or to the end
    of that group, where s_h = shift for h >= Hq // 2 and 0 before, G = group_size. With shift = G // 2 this is
    LongLoRA's shifted sparse attention without its wrap-around: no query ever sees a later key. Nothing is rolled,
    padded or copied, and no length has to divide by G.

    Args:
        query: (B, Hq, Sq, D), float64, float32, bfloat16 or float16, any strides.
        key, value: (B, Hkv, Sk, D), like query; Hq a multiple of Hkv, Sk >= Sq.
        group_size: tokens of a group, at least 1.
        shift: tokens by which the borders of the second half of the query heads lie earlier, 0 <= shift < group_size.
        causal: whether a query sees no later key.
        scale, softcap, sink_tokens, sink_logits, cu_seqlens, kv_start, kv_end, return_lse: as for `window_attention`;
            groups count from the start of the document or from the first real key.

    Returns:
        As `window_attention`.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value does not fit.

    Reference:
        Chen et al., LongLoRA, 2023, arXiv:2309.12307, section 3.2.

    Example:
        >>> query, key, value = torch.randn(1, 8, 100, 64), torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
        >>> group_attention(query, key, value, 32, shift=16).shape
        torch.Size([1, 8, 100, 64])
    """
    rows = (cu_seqlens, kv_start, kv_end)
    args = _prepare(
        query, key, value, group_size, shift, causal, scale, softcap, sink_tokens, sink_logits, *rows
    )  # fmt: skip
    out, lse = torch.ops.longattn.group_attention.default(*args)
    return (out, lse) if return_lse else out


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_size: int,
    shift: int = 0,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_tokens: int = 0,
    sink_logits: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    for name, value_given in (("group_size", group_size), ("shift", shift)):
        check_count(OP, name, value_given)
    if not isinstance(causal, bool):
        raise TypeError(f"{OP}: causal must be a bool, got {causal!r}")
    rest = options(OP, query, key, value, scale, softcap, sink_tokens, sink_logits, cu_seqlens, kv_start, kv_end)
    num_heads = query.shape[1]
    shifts = [0] * (num_heads // 2) + [shift] * (num_heads - num_heads // 2)
    if num_heads == 0:
        shifts = []
    return query, key, value, group_size, shifts, causal, *rest


def _check_band(query: Tensor, group_size: int, shifts: Sequence[int], causal: bool) -> None:
    check_count(OP, "group_size", group_size)
    if group_size < 1:
        raise ValueError(f"{OP}: group_size must be at least 1 token, got {group_size}")
    if len(shifts) != query.shape[1]:
        raise ValueError(
            f"{OP}: shifts must give one shift for each of query's {query.shape[1]} heads, got {len(shifts)}"
        )
    for shift in shifts:
        if shift < 0 or shift >= group_size:
            raise ValueError(f"{OP}: shift must be >= 0 and below group_size {group_size}, got {shift}")


def _make_bands(query: Tensor, group_size: int, shifts: Sequence[int], causal: bool) -> Bands:
    bands = tuple((shift, GroupBand(group_size, shift, causal)) for shift in dict.fromkeys(shifts))
    return bands, tuple(shifts)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.zeros(1, 2, 16, 64, device=device, dtype=dtype)
    return x, x, x, 8


define_attention(OP, "SymInt group_size, SymInt[] shifts, bool causal", _check_band, _make_bands)
dispatch.register(
    OP,
    prepare=_prepare,
    why_not_compiled=why_not_compiled,
    private="_group_fwd",
    example=_example,
    kernel_note=kernel_note,
)
