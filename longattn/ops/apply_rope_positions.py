"""Rotary embedding at given positions, phases formed inside: schema, checks, fake kernel and autograd of one op.

On CUDA the kernel forms cos and sin itself, once a token for all heads, and no table is written or read. Elsewhere a
table is formed in float64 and `apply_rope`'s rotation runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longattn.ops import dispatch
from longattn.ops.apply_rope import Pair, check_rotated, empty_grads, rotate, why_not_rotated
from longattn.ops.checks import refuse_tangents
from longattn.ops.layout import empty_like_order, is_token_major
from longattn.ops.rope_phases import exact_cos_sin, positions_of

__all__ = ["apply_rope_positions"]

OP = "apply_rope_positions"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MOST_PAIRS = 4096  # whose phases a CUDA kernel forms
PHASES = "Tensor? positions, Tensor? cu_seqlens, Tensor inv_freq, float attention_scaling, bool interleaved"

dispatch.library.define(
    f"{OP}(Tensor query, Tensor key, {PHASES}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)
dispatch.library.define(
    f"{OP}_bwd(Tensor grad_query, Tensor grad_key, {PHASES}, bool query_token_major, bool key_token_major) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Implemented by the compiled module on CUDA. positions are int64, inv_freq contiguous float64.
dispatch.library.define(
    f"_rope_positions_fwd(Tensor query, Tensor key, {PHASES}, bool inverse, Tensor(a!) query_out, Tensor(b!) key_out) "
    "-> ()"
)


def apply_rope_positions(
    query: Tensor,
    key: Tensor,
    positions: Tensor | None,
    inv_freq: Tensor,
    attention_scaling: float = 1.0,
    *,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Pair:
    """Rotate pairs of query and key channels by their token's position times each pair's frequency.

    `apply_rope` with the tables of `rope_cos_sin`, to float32's rounding, at positions of any size; on CUDA no table
    exists: the kernel forms the phases, exact as those, from the positions.

    Args:
        query: (B, Hq, S, D), float64, float32, bfloat16 or float16, any strides.
        key: (B, Hk, S, D), like query; the number of heads may differ.
        positions: (S,), (1, S) or (B, S) of an integer dtype, or None where cu_seqlens is given.
        inv_freq: (rotary_dim / 2,) radians a token, floating point, best float64, from `rope_frequencies`; channels
            past rotary_dim pass through.
        attention_scaling: what multiplies the rotated channels, from `rope_frequencies`.
        interleaved: whether channels 2 i and 2 i + 1 are a pair, rather than i and i + rotary_dim / 2.
        cu_seqlens: (documents + 1,) int32, bounds of documents packed in one row (B = 1): positions count from each
            document's start.

    Returns:
        The rotated query and key, in their input's dtype and order of strides.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, both or neither of positions and cu_seqlens are
            given, or inv_freq requires grad, which is not computed.

    Reference:
        Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv:2104.09864.

    Example:
        >>> query, key = torch.randn(2, 8, 5, 64), torch.randn(2, 2, 5, 64)
        >>> inv_freq = 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
        >>> query, key = apply_rope_positions(query, key, torch.arange(5), inv_freq)
    """
    args = _prepare(query, key, positions, inv_freq, attention_scaling, interleaved=interleaved, cu_seqlens=cu_seqlens)
    return torch.ops.longattn.apply_rope_positions.default(*args)


def _prepare(
    query: Tensor,
    key: Tensor,
    positions: Tensor | None,
    inv_freq: Tensor,
    attention_scaling: float = 1.0,
    *,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Any, ...]:
    """The torch op's arguments, checked."""
    check_rotated(OP, query, key, interleaved)
    refuse_tangents(OP, query, key, inv_freq)
    if (positions is None) == (cu_seqlens is None):
        given = "neither" if positions is None else "both"
        raise ValueError(f"{OP}: positions or cu_seqlens must be given, and not both, got {given}")
    if positions is not None:
        _check_positions(positions, query)
    if cu_seqlens is not None:
        _check_documents(cu_seqlens, query)
    _check_frequencies(inv_freq, attention_scaling, query)
    return query, key, positions, cu_seqlens, inv_freq, float(attention_scaling), interleaved


def _check_positions(positions: Tensor, query: Tensor) -> None:
    batch, _, tokens, _ = query.shape
    if not isinstance(positions, Tensor) or positions.dtype not in INTEGERS:
        got = getattr(positions, "dtype", type(positions).__name__)
        raise TypeError(f"{OP}: positions must be a tensor of an integer dtype, got {got}")
    fits = positions.dim() in (1, 2) and positions.shape[-1] == tokens
    if not fits or (positions.dim() == 2 and positions.shape[0] != batch and positions.shape[0] != 1):
        raise ValueError(
            f"{OP}: positions must be ({tokens},) or ({batch}, {tokens}) for query {tuple(query.shape)}, "
            f"got {tuple(positions.shape)}"
        )
    if positions.device != query.device:
        raise ValueError(f"{OP}: positions must be on query's device {query.device}, got {positions.device}")


def _check_documents(cu_seqlens: Tensor, query: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        got = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise TypeError(f"{OP}: cu_seqlens must be an int32 tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{OP}: cu_seqlens must be (documents + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != query.device:
        raise ValueError(f"{OP}: cu_seqlens must be on query's device {query.device}, got {cu_seqlens.device}")
    if query.shape[0] != 1:
        raise ValueError(f"{OP}: cu_seqlens needs batch size 1 (documents packed in one row), got {query.shape[0]}")


def _check_frequencies(inv_freq: Tensor, attention_scaling: float, query: Tensor) -> None:
    if not isinstance(inv_freq, Tensor) or not inv_freq.dtype.is_floating_point:
        got = getattr(inv_freq, "dtype", type(inv_freq).__name__)
        raise TypeError(f"{OP}: inv_freq must be a floating point tensor, got {got}")
    if inv_freq.dim() != 1 or 2 * inv_freq.shape[0] > query.shape[-1]:
        raise ValueError(
            f"{OP}: inv_freq must be (rotary_dim / 2,) with rotary_dim at most head_dim {query.shape[-1]}, "
            f"got {tuple(inv_freq.shape)}"
        )
    if inv_freq.device != query.device:
        raise ValueError(f"{OP}: inv_freq must be on query's device {query.device}, got {inv_freq.device}")
    if inv_freq.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{OP}: inv_freq must not require grad (no gradient is computed for it): pass inv_freq.detach()"
        )
    if isinstance(attention_scaling, bool) or not isinstance(attention_scaling, int | float | torch.SymFloat):
        raise TypeError(f"{OP}: attention_scaling must be a number, got {attention_scaling!r}")
    if not abs(attention_scaling) < math.inf:
        raise ValueError(f"{OP}: attention_scaling must be finite, got {attention_scaling!r}")


def _check_document_values(cu_seqlens: Tensor | None, tokens: int) -> None:
    """Where the values may be read: on the CPU, and anywhere under `longattn.debug()`."""
    if cu_seqlens is None or (cu_seqlens.device.type != "cpu" and not dispatch.debugging()):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        shown = bounds if len(bounds) <= 8 else f"{bounds[:4]} .. {bounds[-4:]}"
        raise ValueError(f"{OP}: cu_seqlens must rise from 0 to the {tokens} tokens of the row, got {shown}")


def _why_not_compiled(query: Tensor, key: Tensor, *rest: Any) -> str | None:
    inv_freq = rest[2]
    if query.device.type == "cuda" and not 1 <= inv_freq.shape[0] <= MOST_PAIRS:
        return f"compiled for 1 to {MOST_PAIRS} rotated pairs on CUDA, not {inv_freq.shape[0]}"
    return why_not_rotated(query, key)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.zeros(1, 2, 16, 64, device=device, dtype=dtype)
    return x, x, torch.arange(16, device=device), torch.ones(32, device=device, dtype=torch.float64)


dispatch.register(OP, prepare=_prepare, why_not_compiled=_why_not_compiled, private="_rope_fwd", example=_example)


def _run(outs: Pair, inputs: Pair, phases: tuple[Any, ...], inverse: bool) -> Pair:
    """Rotate `inputs` into `outs` on the path that dispatch picks."""
    positions, cu_seqlens, inv_freq, scaling, interleaved = phases
    query = inputs[0]
    _check_document_values(cu_seqlens, query.shape[2])
    compiled = dispatch.choose(OP, *inputs, *phases)
    if compiled and query.device.type == "cuda":
        positions = None if positions is None else positions.long()
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        phases = positions, cu_seqlens, inv_freq.double().contiguous(), scaling, interleaved
        torch.ops.longattn._rope_positions_fwd.default(*inputs, *phases, inverse, *outs)
        return outs
    if positions is None:
        positions = positions_of(cu_seqlens, query.shape[2])
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    cos, sin = exact_cos_sin(positions, inv_freq, scaling, dtype)
    return rotate(outs, inputs, cos, sin, interleaved, inverse, compiled)


def _forward_kernel(query: Tensor, key: Tensor, *phases: Any) -> Pair:
    return _run((empty_like_order(query), empty_like_order(key)), (query, key), phases, inverse=False)


def _backward_kernel(grad_query: Tensor, grad_key: Tensor, *args: Any) -> Pair:
    *phases, query_token_major, key_token_major = args
    outs = empty_grads(grad_query, grad_key, query_token_major, key_token_major)
    return _run(outs, (grad_query, grad_key), tuple(phases), inverse=True)


dispatch.implement(OP, _forward_kernel)
dispatch.implement(f"{OP}_bwd", _backward_kernel)


@torch.library.register_fake(f"longattn::{OP}", lib=dispatch.library)
def _forward_fake(query: Tensor, key: Tensor, *phases: Any) -> Pair:
    return empty_like_order(query), empty_like_order(key)


@torch.library.register_fake(f"longattn::{OP}_bwd", lib=dispatch.library)
def _backward_fake(grad_query: Tensor, grad_key: Tensor, *args: Any) -> Pair:
    return empty_grads(grad_query, grad_key, *args[-2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    query, key, positions, cu_seqlens, inv_freq, ctx.scaling, ctx.interleaved = inputs
    if ctx.needs_input_grad[4]:
        raise ValueError(f"{OP}: inv_freq must not require grad (no gradient is computed for it)")
    ctx.token_major = is_token_major(query), is_token_major(key)
    ctx.packed = positions is None
    ctx.save_for_backward(cu_seqlens if positions is None else positions, inv_freq)


def _backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
    where, inv_freq = ctx.saved_tensors
    phases = (None, where) if ctx.packed else (where, None)
    run = torch.ops.longattn.apply_rope_positions_bwd.default
    grads = run(grad_query, grad_key, *phases, inv_freq, ctx.scaling, ctx.interleaved, *ctx.token_major)
    return *grads, None, None, None, None, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(f"{OP}: double backward is not supported")


torch.library.register_autograd(f"longattn::{OP}", _backward, setup_context=_setup_context, lib=dispatch.library)
torch.library.register_autograd(f"longattn::{OP}_bwd", _no_double_backward, lib=dispatch.library)
