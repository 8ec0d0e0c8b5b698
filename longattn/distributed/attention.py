"""Window and group attention over a sequence that is cut across ranks: the public functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from longattn.distributed.agreement import refuse
from longattn.distributed.call import Pattern
from longattn.distributed.ops import define_sharded
from longattn.ops import group_attention as plain_group
from longattn.ops import window_attention as plain_window
from longattn.ops.checks import is_int

__all__ = ["Group", "group_attention", "process_group", "window_attention"]

Group = dist.ProcessGroup | DeviceMesh | str


def process_group(op: str, group: Group) -> dist.ProcessGroup:
    """The process group of a one-dimensional mesh or of a name, or the group itself."""
    return dist.distributed_c10d._resolve_process_group(_name(op, group))  # type: ignore[arg-type]


def _name(op: str, group: Group) -> str:
    if isinstance(group, str):
        return group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{op}: group must be a one-dimensional mesh, such as mesh['cp'], got {group.ndim} dims")
        return group.get_group().group_name
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group must be a ProcessGroup, its name or a DeviceMesh, got {type(group).__name__}")
    return group.group_name


@overload
def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: int | tuple[int, int], *, group: Group,
    offsets: Sequence[int] | None = ..., scale: float | None = ..., softcap: float = ..., sink_tokens: int = ...,
    sink_logits: Tensor | None = ..., cu_seqlens: Tensor | None = ..., kv_start: Tensor | None = ...,
    position_ids: Tensor | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: int | tuple[int, int], *, group: Group,
    offsets: Sequence[int] | None = ..., scale: float | None = ..., softcap: float = ..., sink_tokens: int = ...,
    sink_logits: Tensor | None = ..., cu_seqlens: Tensor | None = ..., kv_start: Tensor | None = ...,
    position_ids: Tensor | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | tuple[int, int],
    *,
    group: Group,
    offsets: Sequence[int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_tokens: int = 0,
    sink_logits: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kv_start: Tensor | None = None,
    position_ids: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`longattn.window_attention` over a sequence whose shards lie on the ranks of a group.

    Rank r holds the positions offsets[r] .. offsets[r + 1] - 1 and receives the keys and values that its queries see
    beyond them: 2 Hkv D (W - 1) numbers for a window of W, whatever the sequence's length and the number of ranks, sent
    while the shard attends to its own keys. Backward sends as many back. (-1, 0), causal attention, receives all keys
    before the shard.

    All ranks of the group make the call, forward and backward, with the same arguments but for the tensors' values;
    these are compared the first time that they are met.

    Args:
        query: (B, Hq, S, D), this rank's shard, rotated at its global positions.
        key, value: (B, Hkv, S, D), this rank's shards.
        window_size: as for the plain function, in tokens of the whole sequence.
        group: ProcessGroup, its name, or a DeviceMesh of one dim such as mesh["cp"]; its ranks hold the shards in their
            order.
        offsets: (ranks + 1,) ints: where each shard begins, and the whole length; shards may be empty. By default all
            have S tokens.
        scale, softcap, sink_tokens, return_lse: as for the plain function; sinks are the sequence's first tokens.
        sink_logits: (Hq,), the same on all ranks; each rank gets its own queries' share of the gradient.
        cu_seqlens: (documents + 1,) int32: borders of the documents in the whole sequence (B = 1). On the CPU, whatever
            the device of query, they are read: nothing is sent across documents. A device's are not, and can't be given
            together with sink_tokens.
        kv_start: (B,) int32: the first real position of each row of a left-padded batch.
        position_ids: (1 or B, S), at which query and key were rotated: compared with the shard's positions in the
            sequence, or in its documents; on devices once for each place of a shard.

    Returns:
        The shard's (B, Hq, S, D), and with return_lse its log-sum-exp (B, Hq, S).

    Raises:
        ValueError, TypeError: an argument does not fit on some rank, or the ranks' arguments differ; on every rank.
        RuntimeError: a rank did not make the call within the group's timeout.

    Reference:
        Liu et al., Ring Attention, 2023, arXiv:2310.01889, for the joining of partial results; here no ring turns.

    Example:
        >>> out = window_attention(query, key, value, 4096, group=mesh["cp"])  # doctest: +SKIP
    """
    op = "window_attention"
    name = _name(op, group)
    rest = (scale, softcap, sink_tokens, sink_logits)

    def prepare() -> tuple[Any, ...]:
        _check_local(op, query, key, value)
        _check_shards(op, offsets, cu_seqlens=cu_seqlens, kv_start=kv_start, position_ids=position_ids)
        return plain_window._prepare(query, key, value, window_size, *rest)

    args = _or_refuse(name, op, query, prepare)
    out, lse, _ = torch.ops.longattn.sharded_window_attention.default(
        *args[:5], [] if offsets is None else list(offsets), name, *args[5:9], cu_seqlens, kv_start, position_ids
    )
    return (out, lse) if return_lse else out


@overload
def group_attention(
    query: Tensor, key: Tensor, value: Tensor, group_size: int, *, group: Group, shift: int | Sequence[int] = ...,
    causal: bool = ..., offsets: Sequence[int] | None = ..., scale: float | None = ..., softcap: float = ...,
    sink_tokens: int = ..., sink_logits: Tensor | None = ..., cu_seqlens: Tensor | None = ...,
    kv_start: Tensor | None = ..., position_ids: Tensor | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def group_attention(
    query: Tensor, key: Tensor, value: Tensor, group_size: int, *, group: Group, shift: int | Sequence[int] = ...,
    causal: bool = ..., offsets: Sequence[int] | None = ..., scale: float | None = ..., softcap: float = ...,
    sink_tokens: int = ..., sink_logits: Tensor | None = ..., cu_seqlens: Tensor | None = ...,
    kv_start: Tensor | None = ..., position_ids: Tensor | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_size: int,
    *,
    group: Group,
    shift: int | Sequence[int] = 0,
    causal: bool = True,
    offsets: Sequence[int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_tokens: int = 0,
    sink_logits: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kv_start: Tensor | None = None,
    position_ids: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`longattn.group_attention` over a sequence whose shards lie on the ranks of a group.

    Where the shards' borders are borders of groups too, nothing is sent but for heads that are shifted: their half of
    the KV heads, `group_size - shift` tokens.

    Args:
        query, key, value: this rank's shards, as for `window_attention`.
        group_size, causal: as for the plain function, in tokens of the whole sequence.
        shift: as for the plain function; or one a query head of this rank, where the heads are sharded too.
        group, offsets, scale, softcap, sink_tokens, sink_logits, cu_seqlens, kv_start, position_ids, return_lse: as for
            `window_attention`.

    Returns:
        As `window_attention`.

    Raises:
        ValueError, TypeError, RuntimeError: as `window_attention`.

    Reference:
        Chen et al., LongLoRA, 2023, arXiv:2309.12307, section 3.2.

    Example:
        >>> out = group_attention(query, key, value, 8192, shift=4096, group=mesh["cp"])  # doctest: +SKIP
    """
    op = "group_attention"
    name = _name(op, group)
    rest = (scale, softcap, sink_tokens, sink_logits)

    def prepare() -> tuple[Any, ...]:
        _check_local(op, query, key, value)
        _check_shards(op, offsets, cu_seqlens=cu_seqlens, kv_start=kv_start, position_ids=position_ids)
        if is_int(shift):
            return plain_group._prepare(query, key, value, group_size, shift, causal, *rest)  # type: ignore[arg-type]
        if not isinstance(shift, list | tuple) or not all(map(is_int, shift)):
            raise TypeError(f"{op}: shift must be an int, or one for each query head, got {shift!r}")
        args = plain_group._prepare(query, key, value, group_size, 0, causal, *rest)
        return *args[:4], list(shift), *args[5:]

    args = _or_refuse(name, op, query, prepare)
    out, lse, _ = torch.ops.longattn.sharded_group_attention.default(
        *args[:6], [] if offsets is None else list(offsets), name, *args[6:10], cu_seqlens, kv_start, position_ids
    )
    return (out, lse) if return_lse else out


def _check_local(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if isinstance(x, DTensor):
            raise TypeError(f"{op}: {name} must be this rank's shard, got a DTensor; call to_local(), or use local_map")


def _check_shards(op: str, offsets: object, **index: object) -> None:
    if offsets is not None and not (isinstance(offsets, list | tuple) and all(map(is_int, offsets))):
        raise TypeError(f"{op}: offsets must be a list of ints, or None for equal shards, got {offsets!r}")
    for name, x in index.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor or None, got {type(x).__name__}")


def _or_refuse(name: str, op: str, query: Tensor, prepare: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """What `prepare` returns; other ranks hear of what it raises."""
    if torch.compiler.is_compiling():
        return prepare()
    try:
        return prepare()
    except (TypeError, ValueError) as error:
        device = query.device.type if isinstance(query, Tensor) else "cpu"
        refuse(process_group(op, name), device, op, error)


def _window_of_heads(band: tuple[Any, ...], start: int, stop: int) -> tuple[Any, ...]:
    return band


def _group_of_heads(band: tuple[Any, ...], start: int, stop: int) -> tuple[Any, ...]:
    size, shifts, causal = band
    return size, shifts[start:stop], causal


WINDOW_NAMES = ("window_size (tokens before)", "window_size (tokens after)")
WINDOW = Pattern("window_attention", WINDOW_NAMES, plain_window._make_bands, plain_window._check_band, _window_of_heads)
GROUP_NAMES = ("group_size", "shift", "causal")
GROUP = Pattern("group_attention", GROUP_NAMES, plain_group._make_bands, plain_group._check_band, _group_of_heads)
define_sharded(WINDOW, "int left, int right")
define_sharded(GROUP, "int group_size, int[] shifts, bool causal")
