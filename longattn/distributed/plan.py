"""Which keys of other ranks the queries of a shard see, on the host alone; changes with how a sequence is cut.

A sequence of N tokens is cut into contiguous shards: rank r holds the positions offsets[r] .. offsets[r + 1] - 1. Both
ends of a band never decrease, so what a shard lacks is one range of keys before it, one behind it, and the sinks.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longattn.ops.band import Band

__all__ = ["HeadSet", "Need", "check_offsets", "head_sets", "needs_of", "pieces", "rows_from"]


@dataclass(frozen=True)
class Need:
    """Keys of other ranks and the shard's queries that see them: positions, each `first .. stop - 1`.

    Args:
        keys: before the shard, or behind it.
        queries: those of the shard that may see any of the keys.
        sinks: whether the keys are first ones of the document, seen whatever the band.
    """

    keys: tuple[int, int]
    queries: tuple[int, int]
    sinks: bool = False

    @property
    def tokens(self) -> int:
        return self.keys[1] - self.keys[0]


@dataclass(frozen=True)
class HeadSet:
    """Query heads whose keys travel together, their KV heads, and the bands of them."""

    query: tuple[int, int]
    kv: tuple[int, int]
    bands: tuple[Band, ...]


def head_sets(num_heads: int, num_kv_heads: int, shifts: Sequence[int], bands: dict[int, Band]) -> tuple[HeadSet, ...]:
    """Cut the heads where their bands differ, if no KV head serves two bands; else they stay together.

    Args:
        num_heads, num_kv_heads: Hq, Hkv.
        shifts: one a query head.
        bands: shift -> band.
    """
    if num_heads == 0:
        return ()
    group = num_heads // num_kv_heads
    runs = [list(run) for _, run in itertools.groupby(range(num_heads), key=lambda head: shifts[head])]
    if any(run[0] % group for run in runs):
        return (HeadSet((0, num_heads), (0, num_kv_heads), tuple(bands.values())),)
    spans = [(run[0], run[-1] + 1) for run in runs]
    return tuple(HeadSet((a, b), (a // group, b // group), (bands[shifts[a]],)) for a, b in spans)


def check_offsets(op: str, offsets: Sequence[int], ranks: int, rank: int, length: int) -> None:
    """Check where the shards begin: from 0, never falling, and this rank's as long as its tensors."""
    if len(offsets) != ranks + 1 or offsets[0] != 0 or list(offsets) != sorted(offsets):
        raise ValueError(
            f"{op}: offsets must be {ranks + 1} positions for {ranks} ranks, rising from 0, got {list(offsets)}"
        )
    expected = offsets[rank + 1] - offsets[rank]
    if length != expected:
        raise ValueError(f"{op}: query must have the shard's {expected} tokens by offsets, got {length}")


def needs_of(
    bands: Sequence[Band], offsets: Sequence[int], rank: int, sinks: int = 0, documents: Sequence[int] | None = None
) -> tuple[Need, ...]:
    """What a rank's shard lacks, in order of position.

    Args:
        bands: of the heads whose keys travel together.
        offsets: (ranks + 1,) positions at which the shards begin.
        rank: whose needs.
        sinks: how many first keys of a document stay visible.
        documents: borders of packed documents; None where the sequence is one.
    """
    first, end = offsets[rank], offsets[rank + 1]
    if first == end:
        return ()
    found = []
    start, stop = _document_at(first, documents, offsets[-1])
    last, sink_stop = min(end, stop), min(start + sinks, first)

    def low(position: int) -> int:
        return max(sink_stop, start, min(band.lo(position - start) for band in bands) + start)  # type: ignore

    if start < sink_stop:
        found.append(Need((start, sink_stop), (first, last), sinks=True))
    if low(first) < first:
        found.append(Need((low(first), first), (first, _first(first, last, lambda p: low(p) >= first))))

    begin, stop = _document_at(end - 1, documents, offsets[-1])

    def high(position: int) -> int:
        return min(stop - 1, max(band.hi(position - begin) for band in bands) + begin)  # type: ignore

    if high(end - 1) >= end:
        queries = (_first(max(first, begin), end, lambda p: high(p) >= end), end)
        found.append(Need((end, high(end - 1) + 1), queries))
    return tuple(found)


def _first(start: int, stop: int, holds: Callable[[int], bool]) -> int:
    """The first position from which on `holds`; `stop` where it does for none."""
    return start + bisect_left(range(start, stop), True, key=holds)


def _document_at(position: int, documents: Sequence[int] | None, total: int) -> tuple[int, int]:
    """The document that holds a position: its start and stop."""
    if documents is None:
        return 0, total
    index = bisect_right(documents, position)
    return documents[index - 1], documents[index]


def pieces(needs: Sequence[Need], shard: tuple[int, int]) -> list[tuple[int, int]]:
    """The parts of what a rank needs that a shard holds: `start, stop` counted from the shard's first token."""
    cut = ((max(n.keys[0], shard[0]), min(n.keys[1], shard[1])) for n in needs)
    return [(a - shard[0], b - shard[0]) for a, b in cut if a < b]


def rows_from(needs: Sequence[Need], shard: tuple[int, int]) -> int:
    """How many tokens of what a rank needs a shard holds."""
    return sum(b - a for a, b in pieces(needs, shard))
