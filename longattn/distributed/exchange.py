"""Sending keys and values to the ranks that need them, and their gradients back; changes with what a message holds.

One message a rank and head set: rows of tokens, (tokens, 2, B, heads, D) with keys before values, so that the two can
never be taken for each other, ordered by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from longattn.distributed.messages import Flight, send
from longattn.distributed.plan import HeadSet, Need, pieces, rows_from
from longattn.ops.scores import accumulate_dtype

__all__ = ["Exchange"]


@dataclass(frozen=True)
class Exchange:
    """What every rank needs of one head set, and who has it.

    Args:
        heads: the head set.
        needs: by rank.
        offsets: (ranks + 1,) positions at which the shards begin.
        rank: this one.
    """

    heads: HeadSet
    needs: tuple[tuple[Need, ...], ...]
    offsets: tuple[int, ...]
    rank: int

    @property
    def idle(self) -> bool:
        """Whether no rank needs anything: all ranks find the same, so that all or none communicate."""
        return not any(self.needs)

    @property
    def mine(self) -> tuple[Need, ...]:
        return self.needs[self.rank]

    @property
    def received_rows(self) -> list[int]:
        """Tokens from each rank."""
        return [rows_from(self.mine, self._shard(rank)) for rank in range(len(self.needs))]

    @property
    def sent_pieces(self) -> list[list[tuple[int, int]]]:
        """Ranges of this shard's tokens for each rank."""
        return [pieces(needs, self._shard(self.rank)) for needs in self.needs]

    def _shard(self, rank: int) -> tuple[int, int]:
        return self.offsets[rank], self.offsets[rank + 1]

    def row_shape(self, key: Tensor) -> tuple[int, int, int, int]:
        return 2, key.shape[0], self.heads.kv[1] - self.heads.kv[0], key.shape[3]

    def parts(self, rows: Tensor) -> list[tuple[Need, Tensor, Tensor]]:
        """Each need with its keys and values (B, heads, tokens, D), views of `rows` (tokens, 2, B, heads, D)."""
        found, first = [], 0
        for need in self.mine:
            part = rows[first : first + need.tokens].permute(1, 2, 3, 0, 4)
            found.append((need, part[0], part[1]))
            first += need.tokens
        return found

    def launch(self, key: Tensor, value: Tensor, to: Tensor, group: dist.ProcessGroup) -> Flight:
        """Start to send this shard's keys and values (B, Hkv, S, D) where they are needed, and to receive into `to`."""
        sent = self.sent_pieces
        splits = [sum(b - a for a, b in ranges) for ranges in sent]
        rows = key.new_empty((sum(splits), *self.row_shape(key)))
        heads, first = slice(*self.heads.kv), 0
        for a, b in (piece for ranges in sent for piece in ranges):
            for index, x in enumerate((key, value)):
                rows[first : first + b - a, index].copy_(x[:, heads, a:b].permute(2, 0, 1, 3))
            first += b - a
        return send(to, rows, self.received_rows, splits, group)

    def launch_back(self, rows: Tensor, group: dist.ProcessGroup) -> Flight:
        """Start to send the gradients of the received rows back to their owners."""
        splits = [sum(b - a for a, b in ranges) for ranges in self.sent_pieces]
        to = rows.new_empty((sum(splits), *rows.shape[1:]))
        return send(to, rows, splits, self.received_rows, group)

    def add_back_(self, rows: Tensor, grad_key: Tensor, grad_value: Tensor) -> None:
        """Add what came back to the gradients of this shard's keys and values, by rank, in the accumulation dtype."""
        ranges = [piece for ranges in self.sent_pieces for piece in ranges]
        starts = [sum(b - a for a, b in ranges[:i]) for i in range(len(ranges))]
        heads, dtype = slice(*self.heads.kv), accumulate_dtype(rows.dtype)
        for low, high in _joined(ranges):
            for index, grad in enumerate((grad_key, grad_value)):
                target = grad[:, heads, low:high]
                total = target.to(dtype)  # the same tensor where the dtype is
                for (a, b), first in zip(ranges, starts, strict=True):
                    if low <= a and b <= high:
                        share = rows[first : first + b - a, index].permute(1, 2, 0, 3)
                        total[:, :, a - low : b - low].add_(share)
                if total.dtype != target.dtype:
                    target.copy_(total)


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of ranges, as ranges that do not meet."""
    joined: list[tuple[int, int]] = []
    for a, b in sorted(ranges):
        if joined and a < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], b))
        else:
            joined.append((a, b))
    return joined
