"""Strided views of a run's tiles: which heads go together, and the slabs that one batched product takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from longattn.ops.tiles import Run

__all__ = ["Heads", "head_sets", "key_view", "query_view", "slabs"]


@dataclass(frozen=True)
class Heads:
    """`count` query heads from `query` on, `query_step` apart, and each one's KV head (`key_step` 0: all share one)."""

    query: int
    query_step: int
    count: int
    key: int
    key_step: int

    def part(self, start: int, count: int) -> Heads:
        """`count` of the heads, from the one numbered `start` on."""
        query, key = self.query + start * self.query_step, self.key + start * self.key_step
        return Heads(query, self.query_step, count, key, self.key_step)


def head_sets(num_heads: int, num_kv_heads: int, shifts: Sequence[int]) -> list[tuple[int, Heads]]:
    """(shift, heads) for all query heads: as few sets as strides can express, each with one shift."""
    group = num_heads // num_kv_heads if num_kv_heads else 1
    sets: list[tuple[int, Heads]] = []
    for shift, run in itertools.groupby(range(num_heads), key=lambda head: shifts[head]):
        heads = list(run)
        start, stop = heads[0], heads[-1] + 1
        whole = start % group == 0 and stop % group == 0
        if whole and (stop - start) // group >= group:
            kv = (stop - start) // group
            sets += [(shift, Heads(start + r, group, kv, start // group, 1)) for r in range(group)]
            continue
        while start < stop:
            border = min(stop, (start // group + 1) * group)
            sets.append((shift, Heads(start, 1, border - start, start // group, 0)))
            start = border
    return sets


Window = tuple[int, int]


def query_view(x: Tensor, batch: Window, heads: Heads, first: int, run: Run) -> Tensor:
    """The query rows of a run: x (B, H, S, ...) -> (batch, heads, tiles, rows, ...); run row 0 is row `first`."""
    return _view(x, batch, heads.query, heads.query_step, heads.count, first + run.query, run.step, run.rows, run.count)


def key_view(x: Tensor, batch: Window, heads: Heads, first: int, run: Run) -> Tensor:
    """The key rows of a run: x (B, H, S, ...) -> (batch, heads, tiles, cols, ...); tiles may overlap."""
    return _view(x, batch, heads.key, heads.key_step, heads.count, first + run.key, run.key_step, run.cols, run.count)


def _view(
    x: Tensor, batch: Window, head: int, head_step: int, heads: int, row: int, step: int, rows: int, tiles: int
) -> Tensor:
    b, h, s, *rest = x.stride()
    size = (batch[1] - batch[0], heads, tiles, rows, *x.shape[3:])
    stride = (b, head_step * h, step * s, s, *rest)
    return x.as_strided(size, stride, x.storage_offset() + batch[0] * b + head * h + row * s)


def slabs(sizes: Sequence[int], most: int) -> Iterator[tuple[int | slice, ...]]:
    """Index a (batch, heads, tiles, ...) view so that its longest axis stays as the batch axis, `most` at a time."""
    longest = max(range(len(sizes)), key=lambda axis: sizes[axis])
    steps = [range(0, size, most) if axis == longest else range(size) for axis, size in enumerate(sizes)]
    for index in itertools.product(*steps):
        yield tuple(slice(i, i + most) if axis == longest else i for axis, i in enumerate(index))
