"""Sliding-window attention: the public function and what makes its op a window."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from longattn.ops import dispatch
from longattn.ops.attention import Bands, define_attention, options
from longattn.ops.band import WindowBand
from longattn.ops.checks import check_count, is_int
from longattn.ops.compiled import why_not_compiled
from longattn.ops.hopper import kernel_note

__all__ = ["window_attention"]

OP = "window_attention"


@overload
def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: int | tuple[int, int], *, scale: float | None = ...,
    softcap: float = ..., sink_tokens: int = ..., sink_logits: Tensor | None = ..., cu_seqlens: Tensor | None = ...,
    kv_start: Tensor | None = ..., kv_end: Tensor | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: int | tuple[int, int], *, scale: float | None = ...,
    softcap: float = ..., sink_tokens: int = ..., sink_logits: Tensor | None = ..., cu_seqlens: Tensor | None = ...,
    kv_start: Tensor | None = ..., kv_end: Tensor | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | tuple[int, int],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_tokens: int = 0,
    sink_logits: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which a query sees a window of keys around its own.

    out_i = sum_j exp(s_ij - lse_i) value_j over p - left <= j <= p + right, with s_ij = scale query_i . key_j and the
    position p = i + Sk - Sq of query i: queries are the last Sq of the Sk tokens. A query that sees no key gives 0 and
    a log-sum-exp of -inf (its sink logit, where there is one). Memory grows with S D, time with the visible area.

    Args:
        query: (B, Hq, Sq, D), float64, float32, bfloat16 or float16, any strides.
        key, value: (B, Hkv, Sk, D), like query; Hq a multiple of Hkv, Sk >= Sq.
        window_size: (left, right), keys before and after the query's own, -1 for no bound; (-1, 0) is causal attention.
            An int W is the `sliding_window` of Hugging Face models: W keys with the query's own, that is (W - 1, 0).
        scale: factor of the logits, 1 / sqrt(D) by default.
        softcap: c > 0 makes logits c tanh(logits / c), after scaling; 0 is off.
        sink_tokens: this many first keys stay visible wherever they are not later than the window's end.
        sink_logits: (Hq,), any float dtype: a logit a head, neither scaled nor capped, that joins the denominator and
            the log-sum-exp and adds no value.
        cu_seqlens: (documents + 1,) int32: borders of documents packed in one row (B = 1, Sq = Sk); a query sees its
            own document only, and sinks count from its start.
        kv_start: (B,) int32: the first real key of each row of a left-padded batch; sinks count from it.
        kv_end: (B,) int32: keys from here on are not written yet; the queries are the last before, p = i + kv_end - Sq.
        return_lse: return the log-sum-exp too.

    Returns:
        (B, Hq, Sq, D) in query's dtype and order of strides, and with return_lse the log-sum-exp (B, Hq, Sq): natural
        log, of scaled and capped logits and the sink logit, float32 (float64 for float64 inputs), differentiable.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value does not fit.

    Reference:
        Beltagy et al., Longformer, 2020, arXiv:2004.05150; Xiao et al., StreamingLLM (sinks), 2023, arXiv:2309.17453.

    Example:
        >>> query, key, value = torch.randn(1, 8, 100, 64), torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
        >>> window_attention(query, key, value, 16, sink_tokens=4).shape
        torch.Size([1, 8, 100, 64])
    """
    rows = (cu_seqlens, kv_start, kv_end)
    args = _prepare(query, key, value, window_size, scale, softcap, sink_tokens, sink_logits, *rows)
    out, lse = torch.ops.longattn.window_attention.default(*args)
    return (out, lse) if return_lse else out


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | tuple[int, int],
    scale: float | None = None,
    softcap: float = 0.0,
    sink_tokens: int = 0,
    sink_logits: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    left, right = _ends(window_size)
    rest = options(OP, query, key, value, scale, softcap, sink_tokens, sink_logits, cu_seqlens, kv_start, kv_end)
    return query, key, value, left, right, *rest


def _ends(window_size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(window_size, tuple | list) and len(window_size) == 2 and all(map(is_int, window_size)):
        left, right = window_size
        check_count(OP, "window_size's left bound", left)
        check_count(OP, "window_size's right bound", right)
        return left, right
    if not is_int(window_size):
        raise TypeError(f"{OP}: window_size must be an int or a pair of ints, got {window_size!r}")
    check_count(OP, "window_size", window_size)
    if window_size < 1:  # type: ignore[operator]
        raise ValueError(f"{OP}: window_size must hold at least 1 key, the query's own, got {window_size}")
    return window_size - 1, 0  # type: ignore[operator]


def _check_band(query: Tensor, left: int, right: int) -> None:
    for name, bound in (("left", left), ("right", right)):
        if bound < -1:
            raise ValueError(f"{OP}: window_size's {name} bound must be >= 0, or -1 for none, got {bound}")
        check_count(OP, f"window_size's {name} bound", bound)


def _make_bands(query: Tensor, left: int, right: int) -> Bands:
    return ((0, WindowBand(left, right)),), (0,) * query.shape[1]


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.zeros(1, 2, 16, 64, device=device, dtype=dtype)
    return x, x, x, 8


define_attention(OP, "SymInt left, SymInt right", _check_band, _make_bands)
dispatch.register(
    OP,
    prepare=_prepare,
    why_not_compiled=why_not_compiled,
    private="_window_fwd",
    example=_example,
    kernel_note=kernel_note,
)
