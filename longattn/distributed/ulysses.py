"""Attention with heads in place of tokens sharded while it runs, for layers that see all keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longattn.distributed.agreement import agree, refuse
from longattn.distributed.call import values_of
from longattn.distributed.messages import send
from longattn.distributed.positions import check_positions
from longattn.ops import dispatch

__all__ = ["ulysses"]

OP = "ulysses"
dispatch.library.define(
    "sharded_trade(Tensor parts, Tensor? position_ids, Tensor? cu_seqlens, str group_name) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
dispatch.library.define("sharded_trade_bwd(Tensor grad, str group_name) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def ulysses(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | None,
    name: str,
    rank: int,
    ranks: int,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attend to the whole sequence with a part of the heads on each rank.

    Each rank sends 2 (Hq + Hkv) D S (P - 1) / P numbers for its shard of S tokens, and as many backward: less than the
    keys of all P shards where the sequence is long, and every rank has the same work, but P is at most Hkv.

    Args:
        attend: (query (B, Hq / P, P S, D), key, value, sink_logits (Hq / P,) or None) -> out like query.
        query: (B, Hq, S, D), this rank's shard; shards are equal.
        key, value: (B, Hkv, S, D).
        sink_logits: (Hq,), or None.
        name: of the group.
        rank, ranks: this one in the group, and P.
        position_ids: (1 or B, S), compared with the shard's.
        cu_seqlens: the documents' borders, which all ranks must be given alike.

    Returns:
        (B, Hq, S, D).

    Raises:
        ValueError: on every rank, as `longattn.distributed.window_attention`.

    Reference:
        Jacobs et al., DeepSpeed Ulysses, 2023, arXiv:2309.14509.
    """
    for what, x in (("query", query), ("key", key)):
        if x.shape[1] % ranks:
            raise ValueError(
                f"{OP}: {what} must have a multiple of {ranks} heads, one part for each rank, got {x.shape[1]}; use "
                "full='gather'"
            )
    if sink_logits is not None:
        sink_logits = sink_logits.view(ranks, -1)[rank]
    sizes = [x.shape[1] // ranks for x in (query, key, value)]
    joined = torch.cat([_by_rank(x, ranks) for x in (query, key, value)], dim=3)  # one message
    got = torch.ops.longattn.sharded_trade.default(joined, position_ids, cu_seqlens, name)
    parts = got.flatten(0, 1).permute(1, 2, 0, 3).split(sizes, dim=1)  # of (P, S, B, (Hq + 2 Hkv) / P, D)
    return _to_tokens(attend(parts[0], parts[1], parts[2], sink_logits), ranks, name)


def _by_rank(x: Tensor, ranks: int) -> Tensor:
    """(B, H, S, D) -> (P, S, B, H / P, D), a view."""
    return x.unflatten(1, (ranks, -1)).permute(1, 3, 0, 2, 4)


def _to_tokens(x: Tensor, ranks: int, name: str) -> Tensor:
    """(B, H / P, P S, D) -> (B, H, S, D)."""
    parts = x.unflatten(2, (ranks, -1)).permute(2, 3, 0, 1, 4)  # (P, S, B, H / P, D)
    got = torch.ops.longattn.sharded_trade.default(parts, None, None, name)
    return got.permute(2, 0, 3, 1, 4).flatten(1, 2)


def _trade(
    parts: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None, name: Any, way: str = "forward"
) -> Tensor:
    """Part r of (P, S, ...) goes to rank r."""
    group = dist.distributed_c10d._resolve_process_group(name)
    ranks, length, device = parts.shape[0], parts.shape[1], parts.device.type
    try:
        if position_ids is not None:
            check_positions(OP, position_ids, cu_seqlens, dist.get_rank(group) * length, length, group)
    except ValueError as error:
        refuse(group, device, OP, error)
    signature = {
        "shape of what is traded (ranks, tokens, batch size, heads, head_dim)": list(parts.shape),
        "dtype": str(parts.dtype),
        "device": device,
        "cu_seqlens": values_of(cu_seqlens),
    }
    agree(group, way, device, OP, signature)
    got = parts.new_empty(parts.shape)
    return send(got, parts.contiguous(), [1] * ranks, [1] * ranks, group).arrived()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.longattn.sharded_trade_bwd.default(grad, ctx.name), None, None, None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.name = inputs[-1]


def _double_backward(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError(f"{OP}: double backward is not supported")


dispatch.implement("sharded_trade", _trade)
dispatch.implement("sharded_trade_bwd", lambda grad, name: _trade(grad, None, None, name, "backward"))
for op, backward, setup in (("sharded_trade", _backward, _setup), ("sharded_trade_bwd", _double_backward, None)):
    torch.library.register_fake(f"longattn::{op}", lambda x, *rest: x.new_empty(x.shape), lib=dispatch.library)
    torch.library.register_autograd(f"longattn::{op}", backward, setup_context=setup, lib=dispatch.library)
