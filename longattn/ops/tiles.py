"""Cuts a band into runs of equal tiles, so that a few batched calls visit just the keys that are seen.

A run is `count` tiles with the same mask: tile t holds `rows` queries from `query + t * step` on and `cols` keys from
`key + t * key_step` on. A window's interior is one run; so are the groups of a text. A triangle (full causal, the head
of a window, a causal group) and a rectangle carry no mask. Sink keys before the band are a rectangle of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from longattn.ops.band import Band

__all__ = ["Run", "additive_mask", "make_runs"]

Kind = Literal["all", "triangle", "band"]
Piece = tuple[int, int, Kind]  # rows start .. stop, and what they see


@dataclass(frozen=True)
class Run:
    """`count` equal tiles; row r of a "band" tile sees columns lo[r] .. hi[r] and the first `sinks` up to hi[r]."""

    query: int
    key: int
    rows: int
    cols: int
    count: int = 1
    step: int = 0  # rows from one tile's queries to the next tile's
    key_step: int = 0  # keys likewise
    kind: Kind = "all"
    lo: tuple[int, ...] = ()
    hi: tuple[int, ...] = ()
    sinks: int = 0
    prefix: bool = False  # another run has these rows too: partial results are merged by their log-sum-exp

    def tiles(self, start: int, count: int) -> Run:
        """`count` of the tiles, from `start` on."""
        return replace(self, query=self.query + start * self.step, key=self.key + start * self.key_step, count=count)

    def shape(self) -> Run:
        """One tile, wherever it stands."""
        return replace(self, query=0, key=0, count=1, step=0, key_step=0)

    def narrowed(self, most: int) -> Iterator[Run]:
        """The same tiles with at most `most` rows; of a triangle each part has the keys that it sees and no others."""
        if self.kind == "band" or (self.kind == "all" and self.rows <= most):
            yield self
            return
        for r in range(0, self.rows, most):
            rows = min(most, self.rows - r)
            part = replace(self, query=self.query + r, rows=rows)
            if self.kind == "triangle":
                ends = tuple(range(r, r + rows))
                part = replace(part, cols=r + rows, kind="band", lo=(0,) * rows, hi=ends)
            yield part


def additive_mask(run: Run, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """0 where a tile's row sees a column, -inf elsewhere: (rows, cols), or None where the run's kind says it all."""
    if run.kind != "band":
        return None
    if device.type == "cpu" and run.rows * run.cols <= 1 << 20:
        return _cached_mask(run.lo, run.hi, run.cols, run.sinks, dtype)
    return _mask(run.lo, run.hi, run.cols, run.sinks, dtype, device)


def _mask(
    lo: tuple[int, ...], hi: tuple[int, ...], cols: int, sinks: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    column = torch.arange(cols, device=device)
    low, high = (torch.tensor(ends, device=device)[:, None] for ends in (lo, hi))
    seen = (column <= high) & ((column >= low) | (column < sinks))
    return torch.zeros(len(lo), cols, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


@lru_cache(maxsize=64)
def _cached_mask(lo: tuple[int, ...], hi: tuple[int, ...], cols: int, sinks: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return _mask(lo, hi, cols, sinks, dtype, torch.device("cpu"))


@lru_cache(maxsize=256)
def make_runs(
    band: Band, num_queries: int, num_keys: int, query_start: int, key_start: int, sinks: int, block: int
) -> tuple[Run, ...]:
    """The runs that cover what a band shows.

    Args:
        band: the two ends.
        num_queries, num_keys: rows and keys at hand.
        query_start, key_start: positions of the first of each; `key_start >= 0`.
        sinks: how many keys from position 0 on stay visible.
        block: rows of a tile where the band slides.

    Returns:
        Runs in query order, then prefix runs. Rows that see no key are in none.
    """
    if num_queries == 0 or num_keys == 0:
        return ()
    position = torch.arange(query_start, query_start + num_queries, device="cpu")
    lows = (band.lo(position) - key_start).clamp(min=0)
    highs = (band.hi(position) - key_start).clamp(max=num_keys - 1)
    cuts = _cuts(lows, highs)
    lo, hi = lows.tolist(), highs.tolist()
    sink_stop = max(0, min(sinks - key_start, num_keys))
    runs: list[Run] = []
    prefixed: list[tuple[int, int]] = []
    for start, stop, kind in _merge_small(_pieces(lo, hi, cuts), block):
        for run in _tiles(lo, hi, start, stop, kind, block):
            parts, rows = _with_sinks(run, hi, sink_stop)
            runs += parts
            prefixed += rows
    prefix = [Run(a, 0, b - a, sink_stop, prefix=True) for a, b in _join_ranges(prefixed)]
    return tuple(_join(runs) + _rows_with_sinks_alone(lo, hi, sink_stop) + prefix)


def _cuts(lo: Tensor, hi: Tensor) -> list[tuple[int, int]]:
    """Row ranges in which each end stands still or goes up one by one, and all rows see a key or none does."""
    slope = torch.stack([lo.diff(), hi.diff()])  # (2, num_queries - 1)
    seen = hi >= lo
    jump = (slope > 1).any(0) | (seen[1:] != seen[:-1])
    bend = torch.zeros_like(jump)
    bend[1:] = (slope[:, 1:] != slope[:, :-1]).any(0) & ~jump[:-1]
    cuts = [0, *(torch.nonzero(jump | bend).flatten() + 1).tolist(), len(lo)]
    return list(zip(cuts, cuts[1:], strict=False))


def _pieces(lo: list[int], hi: list[int], cuts: list[tuple[int, int]]) -> list[Piece]:
    """The shape of each row range that sees keys: a rectangle, a triangle, or a band."""
    pieces: list[Piece] = []
    for start, stop in cuts:
        low, high, last = lo[start], hi[start], hi[stop - 1]
        if high < low:
            continue
        kind: Kind = "band"
        if lo[stop - 1] == low and last == high:
            kind = "all"
        elif lo[stop - 1] == low and high == low and last == high + stop - start - 1:
            kind = "triangle"
        pieces.append((start, stop, kind))
    return pieces


def _merge_small(pieces: list[Piece], block: int) -> list[Piece]:
    """Neighbours that fit into a block become one masked tile: many tiny groups would be many tiny products."""
    merged: list[Piece] = []
    for start, stop, kind in pieces:
        if merged and stop - start <= block // 2:
            before, border, _ = merged[-1]
            if border == start and stop - before <= block:
                merged[-1] = (before, stop, "band")
                continue
        merged.append((start, stop, kind))
    return merged


def _tiles(lo: list[int], hi: list[int], start: int, stop: int, kind: Kind, block: int) -> list[Run]:
    """One row range as runs: whole where it needs no mask, else as many equal tiles as fit and a rest."""
    if kind != "band":
        return [Run(start, lo[start], stop - start, hi[stop - 1] - lo[start] + 1, kind=kind)]
    full = (stop - start) // block
    tiles = [_band_tile(lo, hi, start + t * block, start + (t + 1) * block) for t in ((0, full - 1) if full else ())]
    if full > 1 and (tiles[0].lo, tiles[0].hi) == (tiles[1].lo, tiles[1].hi):
        runs = [replace(tiles[0], count=full, step=block, key_step=lo[start + block] - lo[start])]
    else:
        runs = [_band_tile(lo, hi, start + t * block, start + (t + 1) * block) for t in range(full)]
    if start + full * block < stop:
        runs.append(_band_tile(lo, hi, start + full * block, stop))
    return runs


def _band_tile(lo: list[int], hi: list[int], start: int, stop: int) -> Run:
    key = lo[start]
    low, high = tuple(x - key for x in lo[start:stop]), tuple(x - key for x in hi[start:stop])
    return Run(start, key, stop - start, high[-1] + 1, kind="band", lo=low, hi=high)


def _with_sinks(run: Run, hi: list[int], sink_stop: int) -> tuple[list[Run], list[tuple[int, int]]]:
    """A run with the sinks 0 .. sink_stop: in its tiles where they meet, else the rows that get them as a prefix."""
    if sink_stop == 0:
        return [run], []
    near = 0  # tiles whose keys begin at or before the end of the sinks
    if run.key <= sink_stop:
        near = run.count if run.key_step == 0 else min(run.count, (sink_stop - run.key) // run.key_step + 1)
    parts = [_widened(run.tiles(t, 1), hi, sink_stop) for t in range(near)]
    if near == run.count:
        return parts, []
    rest = run.tiles(near, run.count - near)
    return [*parts, rest], [(rest.query, run.query + (run.count - 1) * run.step + run.rows)]


def _widened(tile: Run, hi: list[int], sink_stop: int) -> Run:
    """A tile whose keys begin within the sinks, with all sinks in it."""
    if tile.key == 0 and not any(tile.lo):
        return tile
    high = tuple(hi[tile.query : tile.query + tile.rows])
    low = tuple(bound + tile.key for bound in (tile.lo or (0,) * tile.rows))
    return replace(tile, key=0, cols=tile.cols + tile.key, kind="band", lo=low, hi=high, sinks=sink_stop)


def _rows_with_sinks_alone(lo: list[int], hi: list[int], sink_stop: int) -> list[Run]:
    """Rows whose band holds none of the keys at hand, but that stand behind the sinks."""
    alone = [row for row in range(len(lo)) if 0 < sink_stop <= hi[row] + 1 <= lo[row]]
    return [Run(alone[0], 0, len(alone), sink_stop)] if alone else []


def _join_ranges(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _join(runs: list[Run]) -> list[Run]:
    """Tiles that follow one another by a constant step become one run: the groups of a text, most of all."""
    joined: list[Run] = []
    for run in runs:
        if joined:
            last = joined[-1]
            end = last.tiles(last.count - 1, 1)
            steps = {(run.query - end.query, run.key - end.key)}
            steps |= {(part.step, part.key_step) for part in (last, run) if part.count > 1}
            if len(steps) == 1 and last.shape() == run.shape():
                step, key_step = steps.pop()
                joined[-1] = replace(last, count=last.count + run.count, step=step, key_step=key_step)
                continue
        joined.append(run)
    return joined
