"""What the banded attention ops share: schema, kernels, fakes, autograd and autocast of any pair of ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longattn.ops import compiled, dispatch, pure_backward, pure_forward
from longattn.ops.band import Band
from longattn.ops.checks import check_attention, check_row_values, check_rows, check_types, refuse_tangents
from longattn.ops.layout import empty_like_order
from longattn.ops.rows import Rows
from longattn.ops.scores import Job, accumulate_dtype

__all__ = ["Bands", "define_attention", "define_autocast", "options"]

OPTIONS = (
    "float scale, float softcap, SymInt sink_tokens, Tensor? sink_logits, Tensor? cu_seqlens, Tensor? kv_start, "
    "Tensor? kv_end, SymInt query_start, SymInt key_start"
)
NUM_OPTIONS = 9
SINK_LOGITS = -6  # where the options hold sink_logits
Bands = tuple[tuple[tuple[int, Band], ...], tuple[int, ...]]  # ((shift, band), ...) and the shift of each query head


def options(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    softcap: float,
    sink_tokens: int,
    sink_logits: Tensor | None,
    cu_seqlens: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
) -> tuple[Any, ...]:
    """The torch op's arguments after the band's, for queries that are the last of the keys' tokens."""
    rows: dict[str, object] = dict(cu_seqlens=cu_seqlens, kv_start=kv_start, kv_end=kv_end)
    tensors = dict(query=query, key=key, value=value, sink_logits=sink_logits, **rows)
    check_types(op, tensors, 1.0 if scale is None else scale, softcap, sink_tokens)
    refuse_tangents(op, *tensors.values())
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.shape[-1] else 1.0
    start = key.shape[2] - query.shape[2]
    return float(scale), float(softcap), sink_tokens, sink_logits, cu_seqlens, kv_start, kv_end, start, 0


def define_attention(
    op: str, band_schema: str, check_band: Callable[..., None], make_bands: Callable[..., Bands]
) -> None:
    """Define `longattn::<op>` and `longattn::<op>_bwd`.

    Args:
        op: the op's name.
        band_schema: schema of the arguments that say which band.
        check_band: (query, *band arguments) -> None; raises ValueError. The arguments may be symbolic.
        make_bands: (query, *band arguments) -> the bands, of arguments that were checked and are plain.
    """
    private = f"_{op.removesuffix('_attention')}"
    compiled.define_private(private, band_schema.replace("SymInt", "int"))
    inputs = "Tensor query, Tensor key, Tensor value"
    tags = (torch.Tag.pt2_compliant_tag,)
    dispatch.library.define(f"{op}({inputs}, {band_schema}, {OPTIONS}) -> (Tensor out, Tensor lse)", tags=tags)
    dispatch.library.define(
        f"{op}_bwd(Tensor grad_out, Tensor? grad_lse, {inputs}, Tensor out, Tensor lse, {band_schema}, {OPTIONS}) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_sink_logits)",
        tags=tags,
    )

    def check(query: Tensor, key: Tensor, value: Tensor, args: tuple[Any, ...]) -> Rows:
        scale, softcap, sinks, sink_logits, cu_seqlens, kv_start, kv_end, query_start, key_start = args[-NUM_OPTIONS:]
        check_attention(op, query, key, value, scale, softcap, sinks, sink_logits)
        rows = Rows(query_start, key_start, cu_seqlens, kv_start, kv_end)
        check_rows(op, query, key, rows)
        check_band(query, *args[:-NUM_OPTIONS])
        return rows

    def job(query: Tensor, rows: Rows, args: tuple[Any, ...]) -> Job:
        bands, shifts = make_bands(query, *args[:-NUM_OPTIONS])
        scale, softcap, sinks = args[-NUM_OPTIONS : -NUM_OPTIONS + 3]
        return Job(bands, shifts, rows, sinks, scale, softcap)

    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        rows = check(query, key, value, args)
        check_row_values(op, query, key, rows)
        serves = dispatch.choose(op, query, key, value, *args)
        query, key, value = map(_dense_channels, (query, key, value))
        if serves:
            return compiled.forward(private, query, key, value, args)
        return pure_forward.forward(query, key, value, job(query, rows, args), args[SINK_LOGITS])

    def backward(
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *args: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = check(query, key, value, args)
        grad_out, query, key, value = map(_dense_channels, (grad_out, query, key, value))
        inputs = grad_out, query, key, value, out, lse
        if dispatch.choose(op, query, key, value, *args):
            return compiled.backward(private, inputs, grad_lse, args)
        return pure_backward.backward(inputs, grad_lse, job(query, rows, args), args[SINK_LOGITS])

    dispatch.implement(op, forward)
    dispatch.implement(f"{op}_bwd", backward)

    @torch.library.register_fake(f"longattn::{op}", lib=dispatch.library)
    def forward_fake(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        check(query, key, value, args)
        return empty_like_order(query), query.new_empty(query.shape[:3], dtype=accumulate_dtype(query.dtype))

    @torch.library.register_fake(f"longattn::{op}_bwd", lib=dispatch.library)
    def backward_fake(
        grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *args: Any
    ) -> tuple[Tensor, ...]:
        sink_logits = args[SINK_LOGITS]
        grads = (empty_like_order(x) for x in (query, key, value))
        return *grads, query.new_empty(0) if sink_logits is None else sink_logits.new_empty(sink_logits.shape)

    _define_autograd(op)
    define_autocast(op)


def _dense_channels(x: Tensor) -> Tensor:
    """The tensor itself, or a copy in its order of strides where the last dim is not contiguous."""
    return x if x.stride(-1) == 1 else empty_like_order(x).copy_(x)


def _define_autograd(op: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, *args = inputs
        ctx.set_materialize_grads(False)
        ctx.tensors = [isinstance(arg, Tensor) for arg in args]
        ctx.plain = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.save_for_backward(query, key, value, *output, *(arg for arg in args if isinstance(arg, Tensor)))

    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *tensors = ctx.saved_tensors
        rest = iter(tensors)
        args = [next(rest) if given else arg for given, arg in zip(ctx.tensors, ctx.plain, strict=True)]
        none = (None,) * len(args)
        if grad_out is None and grad_lse is None:
            return None, None, None, *none
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        run = getattr(torch.ops.longattn, f"{op}_bwd").default
        *grads, grad_sink = run(grad_out, grad_lse, query, key, value, out, lse, *args)
        sink = len(args) + SINK_LOGITS
        return *grads, *(grad_sink if i == sink and args[i] is not None else None for i in range(len(args)))

    def double_backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"{op}: double backward is not supported")

    torch.library.register_autograd(f"longattn::{op}", backward, setup_context=setup_context, lib=dispatch.library)
    torch.library.register_autograd(f"longattn::{op}_bwd", double_backward, lib=dispatch.library)


def define_autocast(op: str) -> None:
    """Under autocast query, key and value are cast (float64 is left alone, as torch does), and nothing else."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def autocast(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(query.device.type)
        cast = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return getattr(torch.ops.longattn, op).default(*cast, *args)

    for key in ("AutocastCPU", "AutocastCUDA"):
        dispatch.library.impl(op, autocast, key)
