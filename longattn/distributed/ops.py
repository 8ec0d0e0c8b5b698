"""The torch ops of sharded attention: schema, kernels, fakes, autograd; changes with what a shard computes when.

Forward: keys and values that other ranks need leave first; the shard attends to its own keys while they travel; queries
that see keys of other ranks attend to those where they arrived, and the two results are joined by their log-sum-exp:
lse = logaddexp(lse_1, lse_2), out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2. No tensor of keys or values is
ever joined to another. Backward: gradients of a set of keys need nothing but the joint out and lse, so those of other
ranks' keys come first and go home while the shard's own are formed.

`remote` is what was received, kept for backward: flat, and as long as shapes alone tell, so that a compiler need not
know where documents end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.distributed.agreement import agree, refuse
from longattn.distributed.call import Call, Pattern
from longattn.distributed.exchange import Exchange
from longattn.ops import dispatch
from longattn.ops.attention import define_autocast
from longattn.ops.layout import empty_like_order
from longattn.ops.scores import accumulate_dtype

__all__ = ["define_sharded"]

OPTIONS = (
    "int[] offsets, str group_name, float scale, float softcap, int sink_tokens, Tensor? sink_logits, "
    "Tensor? cu_seqlens, Tensor? kv_start, Tensor? position_ids"
)
SINK_LOGITS = -4  # where the options hold sink_logits
CHUNK = 8192  # tokens that are joined at a time, in the accumulation dtype


def define_sharded(pattern: Pattern, band_schema: str) -> None:
    """Define `longattn::sharded_<op>` and `longattn::sharded_<op>_bwd`.

    Args:
        pattern: which band.
        band_schema: schema of the band's arguments.
    """
    op = f"sharded_{pattern.op}"
    inputs = "Tensor query, Tensor key, Tensor value"
    tags = (torch.Tag.pt2_compliant_tag,)
    schema = f"{op}({inputs}, {band_schema}, {OPTIONS}) -> (Tensor out, Tensor lse, Tensor remote)"
    dispatch.library.define(schema, tags=tags)
    dispatch.library.define(
        f"{op}_bwd(Tensor grad_out, Tensor? grad_lse, {inputs}, Tensor out, Tensor lse, Tensor remote, {band_schema}, "
        f"{OPTIONS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_sink_logits)",
        tags=tags,
    )

    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        call = Call(pattern, query, key, args)
        try:
            call.check(query, key, value)
            call.check_values(query)
        except (TypeError, ValueError) as error:
            refuse(call.group, query.device.type, pattern.op, error)
        agree(call.group, "forward", query.device.type, pattern.op, call.signature(query, key))
        return _forward(call, query, key, value)

    def backward(
        grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out, lse, remote, *args = rest
        call = Call(pattern, query, key, tuple(args))
        agree(call.group, "backward", query.device.type, pattern.op, call.signature(query, key))
        return _backward(call, (grad_out, query, key, value, out, lse), grad_lse, remote)

    dispatch.implement(op, forward)
    dispatch.implement(f"{op}_bwd", backward)

    @torch.library.register_fake(f"longattn::{op}", lib=dispatch.library)
    def forward_fake(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        call = Call(pattern, query, key, args)
        call.check(query, key, value)
        lse = query.new_empty(query.shape[:3], dtype=accumulate_dtype(query.dtype))
        return empty_like_order(query), lse, key.new_empty(call.remote_size(query, key))

    @torch.library.register_fake(f"longattn::{op}_bwd", lib=dispatch.library)
    def backward_fake(
        grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        sink_logits = rest[SINK_LOGITS]
        grads = (empty_like_order(x) for x in (query, key, value))
        return *grads, query.new_empty(0) if sink_logits is None else sink_logits.new_empty(sink_logits.shape)

    _define_autograd(op)
    define_autocast(op)


def _plain(call: Call, suffix: str = "") -> Any:
    return getattr(torch.ops.longattn, call.pattern.op + suffix).default


def _rows(remote: Tensor, exchanges: list[Exchange], key: Tensor) -> list[Tensor]:
    """Views of the flat tensor of what was received, one a head set: (tokens, 2, B, heads, D)."""
    shapes = [(sum(need.tokens for need in x.mine), *x.row_shape(key)) for x in exchanges]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [remote[end - size : end].view(shape) for shape, size, end in zip(shapes, sizes, ends, strict=True)]


def _forward(call: Call, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exchanges = call.exchanges(query, key)
    remote = key.new_empty(call.remote_size(query, key))
    rows = _rows(remote, exchanges, key)
    flights = [x.launch(key, value, to, call.group) for x, to in zip(exchanges, rows, strict=True)]
    if query.shape[2]:
        out, lse = _plain(call)(query, key, value, *call.own(query))
    else:
        out, lse = empty_like_order(query), query.new_empty(query.shape[:3], dtype=accumulate_dtype(query.dtype))
    for exchange, flight in zip(exchanges, flights, strict=True):
        heads = slice(*exchange.heads.query)
        for need, far_key, far_value in exchange.parts(flight.arrived()):
            tokens = call.queries(need)
            part = _plain(call)(query[:, heads, tokens], far_key, far_value, *call.far(need, exchange.heads, query))
            _join_(out[:, heads, tokens], lse[:, heads, tokens], *part)
    return out, lse, remote


def _join_(out: Tensor, lse: Tensor, far_out: Tensor, far_lse: Tensor) -> None:
    """Join attention over other keys, out (B, H, S, D) and lse (B, H, S), to the first pair in place."""
    for first in range(0, out.shape[2], CHUNK):
        rows = slice(first, first + CHUNK)
        mine, far = lse[:, :, rows], far_lse[:, :, rows]
        total = torch.logaddexp(mine, far)
        safe = total.masked_fill(total == -torch.inf, 0.0)
        near = out[:, :, rows].to(lse.dtype) * (mine - safe).exp()[..., None]
        near.addcmul_(far_out[:, :, rows].to(lse.dtype), (far - safe).exp()[..., None])
        out[:, :, rows] = near.to(out.dtype)
        lse[:, :, rows] = total


def _backward(
    call: Call, inputs: tuple[Tensor, ...], grad_lse: Tensor | None, remote: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_out, query, key, value, out, lse = inputs
    exchanges = call.exchanges(query, key)
    flights, far_queries = [], []
    run = _plain(call, "_bwd")
    for exchange, rows in zip(exchanges, _rows(remote, exchanges, key), strict=True):
        grads = torch.empty_like(rows)
        heads = slice(*exchange.heads.query)
        places = exchange.parts(grads)
        for (need, far_key, far_value), (_, to_key, to_value) in zip(exchange.parts(rows), places, strict=True):
            index = (slice(None), heads, call.queries(need))
            part = grad_out[index], None if grad_lse is None else grad_lse[index], query[index], far_key, far_value
            args = call.far(need, exchange.heads, query)
            share, grad_key, grad_value, _ = run(*part, out[index], lse[index], *args)
            to_key.copy_(grad_key)
            to_value.copy_(grad_value)
            far_queries.append((index, share))
        flights.append(exchange.launch_back(grads, call.group))
    if query.shape[2]:
        own = call.own(query)
        grad_query, grad_key, grad_value, grad_sinks = run(grad_out, grad_lse, query, key, value, out, lse, *own)
    else:
        grad_query, grad_key, grad_value = (empty_like_order(x) for x in (query, key, value))
        grad_sinks = query.new_empty(0) if call.sink_logits is None else torch.zeros_like(call.sink_logits)
    for index, share in far_queries:
        grad_query[index].add_(share)
    for exchange, flight in zip(exchanges, flights, strict=True):
        exchange.add_back_(flight.arrived(), grad_key, grad_value)
    return grad_query, grad_key, grad_value, grad_sinks


def _define_autograd(op: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        query, key, value, *args = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.tensors = [isinstance(arg, Tensor) for arg in args]
        ctx.plain = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.save_for_backward(query, key, value, *output, *(arg for arg in args if isinstance(arg, Tensor)))

    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, remote, *tensors = ctx.saved_tensors
        rest = iter(tensors)
        args = [next(rest) if given else arg for given, arg in zip(ctx.tensors, ctx.plain, strict=True)]
        if grad_out is None:  # other ranks wait for what this one sends back
            grad_out = torch.zeros_like(out)
        run = getattr(torch.ops.longattn, f"{op}_bwd").default
        *grads, grad_sink = run(grad_out, grad_lse, query, key, value, out, lse, remote, *args)
        sink = len(args) + SINK_LOGITS
        return *grads, *(grad_sink if i == sink and args[i] is not None else None for i in range(len(args)))

    def double_backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"{op}: double backward is not supported")

    torch.library.register_autograd(f"longattn::{op}", backward, setup_context=setup_context, lib=dispatch.library)
    torch.library.register_autograd(f"longattn::{op}_bwd", double_backward, lib=dispatch.library)
