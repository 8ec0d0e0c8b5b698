"""Rotary embedding of queries and keys: schema, checks, pure-PyTorch path, fake kernel and autograd of one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.ops import dispatch
from longattn.ops.checks import refuse_tangents
from longattn.ops.compiled import why_not_card
from longattn.ops.layout import empty_in_order, empty_like_order, is_token_major

__all__ = ["Pair", "apply_rope", "check_rotated", "empty_grads", "rotate", "why_not_rotated"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPILED_DTYPES = (torch.float32, torch.bfloat16)
Pair = tuple[Tensor, Tensor]

dispatch.library.define(
    "apply_rope(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The gradients' order of strides is the inputs', which the incoming gradients need not have, so it is passed.
dispatch.library.define(
    "apply_rope_bwd(Tensor grad_query, Tensor grad_key, Tensor cos, Tensor sin, bool interleaved, "
    "bool query_token_major, bool key_token_major) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Implemented by the compiled module. cos and sin are float32; inverse rotates by the negated angle.
dispatch.library.define(
    "_rope_fwd(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved, bool inverse, "
    "Tensor(a!) query_out, Tensor(b!) key_out) -> ()"
)


def apply_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Pair:
    """Rotate pairs of query and key channels by the angles whose cosines and sines are given.

    For every pair (a, b) of channels: (a, b) -> (a cos - b sin, b cos + a sin). Half-split pairs channel i with
    i + rotary_dim / 2, interleaved pairs 2 i with 2 i + 1. Channels past rotary_dim pass through. Computed in float32
    (float64 where the input is) and rounded once; gradients are the rotation by the negated angle.

    Args:
        query: (B, Hq, S, D), float64, float32, bfloat16 or float16, any strides.
        key: (B, Hk, S, D), like query; the number of heads may differ.
        cos: (S, w) or (B, S, w) or (1, S, w), any float dtype, with w = rotary_dim / 2. A table with D / 2 < w <= D is
            read as w = rotary_dim, each angle twice: [f, f] when half-split, f0 f0 f1 f1 when interleaved. A narrower
            one always has one column a pair; for a partial rotary whose table holds each angle twice, pass
            `cos[..., : w // 2]` (half-split) or `cos[..., ::2]` (interleaved).
        sin: like cos.
        interleaved: how channels are paired.

    Returns:
        The rotated query and key, in their input's dtype and order of strides.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or cos or sin requires grad, which is not computed.

    Reference:
        Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv:2104.09864.

    Example:
        >>> query, key = torch.randn(2, 8, 5, 64), torch.randn(2, 2, 5, 64)
        >>> angle = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(32) / 32)
        >>> query, key = apply_rope(query, key, angle.cos(), angle.sin())
    """
    return torch.ops.longattn.apply_rope.default(*_prepare(query, key, cos, sin, interleaved=interleaved))


def _prepare(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Any, ...]:
    """The torch op's arguments: checked, the tables reduced to one column a pair."""
    check_rotated("apply_rope", query, key, interleaved)
    refuse_tangents("apply_rope", query, key, cos, sin)
    for name, table in (("cos", cos), ("sin", sin)):
        _check_table(name, table, query)
    if cos.shape != sin.shape:
        raise ValueError(f"apply_rope: sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    width = cos.shape[-1]
    if 2 * width > query.shape[-1]:
        pairs = (..., slice(None, None, 2)) if interleaved else (..., slice(width // 2))
        cos, sin = cos[pairs], sin[pairs]
    return query, key, cos, sin, interleaved


def check_rotated(op: str, query: Tensor, key: Tensor, interleaved: bool) -> None:
    """Check what every rotary op takes."""
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} must be (B, H, S, D), got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{op}: {name} must be one of {allowed}, got {tensor.dtype}")
    if not isinstance(interleaved, bool):
        raise TypeError(f"{op}: interleaved must be a bool, got {interleaved!r}")
    if key.device != query.device:
        raise ValueError(f"{op}: key must be on query's device {query.device}, got {key.device}")
    if key.dtype != query.dtype:
        raise TypeError(f"{op}: key must have query's dtype {query.dtype}, got {key.dtype}")
    batch, _, tokens, dim = query.shape
    if key.shape[0] != batch or key.shape[2] != tokens or key.shape[3] != dim:
        expected = f"({batch}, H, {tokens}, {dim})"
        raise ValueError(f"{op}: key must be {expected} like query but for H, got {tuple(key.shape)}")


def _check_table(name: str, table: Tensor, query: Tensor) -> None:
    """Check cos or sin against a checked query."""
    if not isinstance(table, Tensor):
        raise TypeError(f"apply_rope: {name} must be a tensor, got {type(table).__name__}")
    if not table.dtype.is_floating_point:
        raise TypeError(f"apply_rope: {name} must have a float dtype, got {table.dtype}")
    if table.device != query.device:
        raise ValueError(f"apply_rope: {name} must be on query's device {query.device}, got {table.device}")
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"apply_rope: {name} must not require grad (no gradient is computed for it): pass {name}.detach()"
        )
    batch, _, tokens, dim = query.shape
    fits = table.dim() in (2, 3) and table.shape[-2] == tokens
    if not fits or (table.dim() == 3 and table.shape[0] != batch and table.shape[0] != 1):
        expected = f"({tokens}, w) or ({batch}, {tokens}, w)"
        raise ValueError(
            f"apply_rope: {name} must be {expected} for query {tuple(query.shape)}, got {tuple(table.shape)}"
        )
    width = table.shape[-1]
    if width > dim:
        raise ValueError(f"apply_rope: {name} must be at most head_dim {dim} wide, got {width}")
    if 2 * width > dim and width % 2:
        raise ValueError(
            f"apply_rope: {name} wider than head_dim / 2 = {dim / 2:g} holds each angle twice, got odd width {width}"
        )


def why_not_rotated(query: Tensor, key: Tensor, *_: Any) -> str | None:
    """Why the compiled rotary kernels can't serve these tensors; None where they can."""
    on_cpu = query.device.type == "cpu"
    if query.dtype not in COMPILED_DTYPES and (on_cpu or query.dtype != torch.float16):
        served = "float32 and bfloat16" if on_cpu else "float32, bfloat16 and float16"
        return f"compiled for {served}, not {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] > 1 and (query.stride(-1) != 1 or key.stride(-1) != 1):
        return "the channels of query or key are not contiguous"
    return None if on_cpu else why_not_card(query.device)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.zeros(1, 2, 16, 64, device=device, dtype=dtype)
    table = torch.ones(16, 32, device=device)
    return x, x, table, table


dispatch.register(
    "apply_rope", prepare=_prepare, why_not_compiled=why_not_rotated, private="_rope_fwd", example=_example
)


def _rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """The pure path for one tensor. out, x: (B, H, S, D); cos, sin: (S, w) or (B, S, w), in the dtype to compute in."""
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]  # (B, 1, S, w)
    half = cos.shape[-1]
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first].to(cos.dtype), x[..., second].to(cos.dtype)  # (B, H, S, w)
    out[..., first] = (a * cos).addcmul_(b, sin, value=-1)
    out[..., second] = (b * cos).addcmul_(a, sin)
    out[..., 2 * half :] = x[..., 2 * half :]


def _run(outs: Pair, inputs: Pair, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Pair:
    """Rotate `inputs` into `outs` on the path that dispatch picks."""
    compute = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    cos, sin = cos.to(compute), sin.to(compute)
    compiled = dispatch.choose("apply_rope", *inputs, cos, sin, interleaved)
    return rotate(outs, inputs, cos, sin, interleaved, inverse, compiled)


def rotate(
    outs: Pair, inputs: Pair, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, compiled: bool
) -> Pair:
    """Rotate `inputs` into `outs`, compiled or pure; cos and sin are in the dtype to compute in."""
    if compiled:
        if cos.stride(-1) != 1 or sin.stride(-1) != 1:  # every second column of an interleaved table of width D
            # an empty table calls itself contiguous whatever its strides, and a clone's are new
            cos, sin = (table.clone(memory_format=torch.contiguous_format) for table in (cos, sin))
        torch.ops.longattn._rope_fwd.default(*inputs, cos, sin, interleaved, inverse, *outs)
        return outs
    if inverse:
        sin = -sin
    for out, x in zip(outs, inputs, strict=True):
        _rotate(out, x, cos, sin, interleaved)
    return outs


def _forward_kernel(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Pair:
    outs = empty_like_order(query), empty_like_order(key)
    return _run(outs, (query, key), cos, sin, interleaved, inverse=False)


def empty_grads(grad_query: Tensor, grad_key: Tensor, query_token_major: bool, key_token_major: bool) -> Pair:
    """What a rotary op's gradients are written to: in the order of strides of its query and key."""
    return (
        empty_in_order(grad_query, grad_query.shape, query_token_major),
        empty_in_order(grad_key, grad_key.shape, key_token_major),
    )


def _backward_kernel(
    grad_query: Tensor,
    grad_key: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    query_token_major: bool,
    key_token_major: bool,
) -> Pair:
    outs = empty_grads(grad_query, grad_key, query_token_major, key_token_major)
    return _run(outs, (grad_query, grad_key), cos, sin, interleaved, inverse=True)


dispatch.implement("apply_rope", _forward_kernel)
dispatch.implement("apply_rope_bwd", _backward_kernel)


@torch.library.register_fake("longattn::apply_rope", lib=dispatch.library)
def _forward_fake(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Pair:
    return empty_like_order(query), empty_like_order(key)


@torch.library.register_fake("longattn::apply_rope_bwd", lib=dispatch.library)
def _backward_fake(
    grad_query: Tensor, grad_key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *token_major: bool
) -> Pair:
    return empty_grads(grad_query, grad_key, *token_major)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    query, key, cos, sin, ctx.interleaved = inputs
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        raise ValueError("apply_rope: cos and sin must not require grad (no gradient is computed for them)")
    ctx.token_major = is_token_major(query), is_token_major(key)
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    grads = torch.ops.longattn.apply_rope_bwd.default(grad_query, grad_key, cos, sin, ctx.interleaved, *ctx.token_major)
    return *grads, None, None, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("apply_rope: double backward is not supported")


torch.library.register_autograd("longattn::apply_rope", _backward, setup_context=_setup_context, lib=dispatch.library)
torch.library.register_autograd("longattn::apply_rope_bwd", _no_double_backward, lib=dispatch.library)
