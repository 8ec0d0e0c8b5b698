"""What is measured on a GPU, most valuable first: windows, groups, rotary embedding, decoding; the grid of windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from longattn.bench.cases import Case
from longattn.bench.rope import RopeShape
from longattn.pattern import Pattern

__all__ = ["FULL_SIZE", "TINY", "Cell", "Sizes", "cells", "same_area"]

K = 1024


@dataclass(frozen=True)
class Sizes:
    """All sizes that cells are made of; `heads` are (query heads, key heads, head dim)."""

    tokens: int  # of all batch rows together, where a text is not longer
    heads: tuple[tuple[int, int, int], ...]
    core: tuple[tuple[int, int], ...]  # (length, window)
    groups: tuple[tuple[int, int], ...]  # (length, group)
    decoding: tuple[tuple[int, int], ...]  # (keys, window), 0 for all keys
    lengths: tuple[int, ...]
    windows: tuple[int, ...]


FULL_SIZE = Sizes(
    tokens=32 * K,
    heads=((32, 32, 64), (32, 4, 128)),
    core=((8 * K, K), (32 * K, K), (8 * K, 128), (32 * K, 4 * K), (32 * K, 128), (8 * K, 4 * K)),
    groups=((8 * K, 2 * K), (32 * K, 8 * K)),
    decoding=((128 * K, 0), (4 * K, 0), (128 * K, K)),
    lengths=(2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K),
    windows=(128, 256, 512, K, 2 * K, 4 * K),
)
TINY = Sizes(
    tokens=256,
    heads=((4, 4, 16), (4, 2, 32)),
    core=((64, 16), (256, 8)),
    groups=((128, 32),),
    decoding=((256, 0), (128, 16)),
    lengths=(64, 256),
    windows=(8, 64),
)


@dataclass(frozen=True)
class Cell:
    """One cell: `what` says how it is measured, `name` tells it from all others of a run."""

    what: str  # window, group, decode or rope
    measured: Case | RopeShape

    @property
    def name(self) -> str:
        if isinstance(self.measured, Case):
            return f"{self.what} {self.measured.shape}"
        rope = self.measured
        return f"{self.what} H{rope.heads} K{rope.kv_heads} S{rope.tokens} D{rope.head_dim}"


def same_area(pattern: Pattern, tokens: int) -> Pattern:
    """The window whose visible area is nearest to that of a pattern."""
    wanted, low, high = pattern.visible(tokens), 1, tokens
    while low < high:
        middle = (low + high) // 2
        if Pattern("window", middle).visible(tokens) < wanted:
            low = middle + 1
        else:
            high = middle
    near = (Pattern("window", size) for size in {max(1, low - 1), low})
    return min(near, key=lambda window: abs(window.visible(tokens) - wanted))


def cells(stage: str, sizes: Sizes, device: str) -> list[Cell]:
    """The cells of a stage, `core` or `grid`, in order."""
    return list(_core(sizes, device) if stage == "core" else _grid(sizes, device))


def _case(sizes: Sizes, heads: tuple[int, int, int], tokens: int, pattern: Pattern, device: str) -> Case:
    batch = max(1, sizes.tokens // tokens)
    return Case(batch, heads[0], heads[1], tokens, heads[2], pattern, torch.bfloat16, device=device)


def _core(sizes: Sizes, device: str) -> Iterator[Cell]:
    for tokens, window in sizes.core:
        for heads in sizes.heads:
            yield Cell("window", _case(sizes, heads, tokens, Pattern("window", window), device))
    for tokens, group in sizes.groups:
        for heads in sizes.heads:
            yield Cell("group", _case(sizes, heads, tokens, Pattern("group", group, group // 2), device))
    for heads in sizes.heads:
        yield Cell("rope", RopeShape(heads[0], heads[1], sizes.tokens, heads[2], device))
    for keys, window in sizes.decoding:
        pattern = Pattern("window", window) if window else Pattern("full")
        case = _case(sizes, sizes.heads[-1], keys, pattern, device)
        yield Cell("decode", replace(case, batch=1, queries=1))


def _grid(sizes: Sizes, device: str) -> Iterator[Cell]:
    for heads in sizes.heads:
        for window in sizes.windows:
            for tokens in sizes.lengths:
                if tokens > window:
                    yield Cell("window", _case(sizes, heads, tokens, Pattern("window", window), device))
