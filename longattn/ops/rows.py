"""What padding, static caches and packed documents make of a batch: parts that are plain attention each.

On the CPU the values are read and every part is visited alone, so that no work is spent on padding or across documents.
Values of device tensors are never read: there every row carries its own ends, and a tile is masked by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.ops.band import Band

__all__ = ["RowEnds", "Rows", "Segment", "segments"]


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch stand: positions of the first query and key, padding, cache fill, documents."""

    query_start: int
    key_start: int
    cu_seqlens: Tensor | None = None  # (documents + 1,) int32
    kv_start: Tensor | None = None  # (B,) int32
    kv_end: Tensor | None = None  # (B,) int32

    @property
    def ragged(self) -> bool:
        return self.cu_seqlens is not None or self.kv_start is not None or self.kv_end is not None


@dataclass(frozen=True)
class Segment:
    """Index ranges of batch rows, queries and keys, and the positions of the first query and key."""

    batch: tuple[int, int]
    query: tuple[int, int]
    key: tuple[int, int]
    query_start: int
    key_start: int


def segments(rows: Rows, batch: int, num_queries: int, num_keys: int) -> list[Segment]:
    """Cut a batch on the CPU into segments; queries that are in none see no key."""
    if rows.cu_seqlens is not None:
        bounds = rows.cu_seqlens.tolist()
        spans = [(0, batch, a, b, rows.query_start) for a, b in zip(bounds, bounds[1:], strict=False)]
    elif rows.ragged:
        first = rows.kv_start.tolist() if rows.kv_start is not None else [0] * batch
        last = rows.kv_end.tolist() if rows.kv_end is not None else [rows.key_start + num_keys] * batch
        spans = []
        for b, (start, stop) in enumerate(zip(first, last, strict=True)):
            offset = rows.query_start if rows.kv_end is None else stop - num_queries
            if spans and spans[-1][2:] == (start, stop, offset):
                spans[-1] = (spans[-1][0], b + 1, start, stop, offset)
            else:
                spans.append((b, b + 1, start, stop, offset))
    else:
        query, key = (0, num_queries), (0, num_keys)
        return [Segment((0, batch), query, key, rows.query_start, rows.key_start)]
    cut = (_segment(*span, rows, num_queries, num_keys) for span in spans)
    return [part for part in cut if part.query[0] < part.query[1] and part.key[0] < part.key[1]]


def _segment(
    b0: int, b1: int, start: int, stop: int, offset: int, rows: Rows, num_queries: int, num_keys: int
) -> Segment:
    """The part whose positions are start .. stop; query i stands at `i + offset`, key j at `j + key_start`."""
    q1 = min(num_queries, stop - offset) if rows.cu_seqlens is not None else num_queries
    query = (max(0, start - offset), q1)
    key = (max(0, start - rows.key_start), min(num_keys, stop - rows.key_start))
    return Segment((b0, b1), query, key, query[0] + offset - start, key[0] + rows.key_start - start)


@dataclass(frozen=True)
class RowEnds:
    """The key indices that each query sees, on the tensors' device: low .. high and first .. sink - 1, all (B, Sq)."""

    low: Tensor
    high: Tensor
    first: Tensor
    sink: Tensor

    @staticmethod
    def of(
        band: Band, rows: Rows, sinks: int, batch: int, num_queries: int, num_keys: int, device: torch.device
    ) -> RowEnds:
        index = torch.arange(num_queries, device=device).expand(batch, -1)  # (B, Sq)
        if rows.kv_end is not None:
            stop = rows.kv_end.long().clamp(0, num_keys)[:, None]
            position = index + stop - num_queries
        else:
            stop = torch.full((batch, 1), rows.key_start + num_keys, device=device)
            position = index + rows.query_start
        start = torch.zeros_like(stop)
        if rows.kv_start is not None:
            start = rows.kv_start.long().clamp(min=0)[:, None]
        if rows.cu_seqlens is not None:
            bounds = rows.cu_seqlens.long()
            document = torch.searchsorted(bounds, position.contiguous(), right=True).clamp(1, len(bounds) - 1)
            start, stop = bounds[document - 1], bounds[document]
        real = (position >= start) & (position < stop) if rows.cu_seqlens is not None else position >= start
        base = start - rows.key_start
        low = torch.maximum(band.lo(position - start) + base, base)
        high = torch.minimum(band.hi(position - start) + base, stop - rows.key_start - 1)
        high = torch.where(real, high, torch.full_like(high, -1))
        first = base.expand_as(low)
        return RowEnds(low, high, first, first + sinks)

    def seen(self, batch: Tensor | slice, query: Tensor, key: Tensor) -> Tensor:
        """Which of the keys `key` (..., 1, cols) the queries `query` (..., rows, 1) see: bool."""
        low, high, first, sink = (end[batch][:, query] for end in (self.low, self.high, self.first, self.sink))
        return (key <= high) & ((key >= low) | ((key >= first) & (key < sink)))
