"""Whether a shard's position ids are those of its place in the sequence; changes with how sequences are cut."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from longattn.distributed.agreement import first_time
from longattn.ops.dispatch import debugging

__all__ = ["check_positions", "positions_of"]


def positions_of(start: int, stop: int, borders: Tensor | None, device: torch.device) -> Tensor:
    """int64 (stop - start,): positions in the sequence, or, between borders (documents + 1,), in each document."""
    positions = torch.arange(start, stop, device=device)
    if borders is not None:
        starts = borders.to(device).long()
        positions = positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
    return positions


def check_positions(
    op: str, position_ids: Tensor, cu_seqlens: Tensor | None, first: int, length: int, group: dist.ProcessGroup
) -> None:
    """Check the position ids of a shard of `length` tokens that begins at position `first`.

    Those on the CPU are always read; those on a device, where reading makes the host wait, once a shard's place.

    Raises:
        ValueError: they are others, as those of a shard that is not contiguous, or where they were left out.
    """
    if position_ids.shape[-1] != length:
        raise ValueError(f"{op}: position_ids must be (1 or B, {length}), got {tuple(position_ids.shape)}")
    if length == 0 or not _may_read(position_ids, (first, length), group):
        return
    expected = positions_of(first, first + length, cu_seqlens, position_ids.device)
    if not bool((position_ids == expected).all()):
        raise ValueError(
            f"{op}: position_ids must be those of the whole sequence, {int(expected[0])} to {int(expected[-1])} on "
            f"this rank, got {int(position_ids.flatten()[0])} to {int(position_ids.flatten()[-1])}; shard_batch gives "
            "them, and shards that are not contiguous (head and tail, zig-zag) are not served"
        )


def _may_read(position_ids: Tensor, place: tuple[int, int], group: dist.ProcessGroup) -> bool:
    return position_ids.device.type == "cpu" or debugging() or first_time(group, ("position_ids", *place))
