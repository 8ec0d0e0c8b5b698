"""The band: the two ends of the interval of keys that a query sees. A new pattern is a new pair of ends, here alone.

Positions count from the first real token of a row or document. Both ends never decrease as the position grows; every
tile range and every mask in this folder follows from them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Band", "GroupBand", "WindowBand"]

FAR = 1 << 60  # beyond every position, and a sum of two still fits into int64


class Band(Hashable, Protocol):
    """Query position p sees the keys lo(p) <= j <= hi(p); keys that do not exist are cut off by the caller."""

    def lo(self, position: Tensor) -> Tensor: ...

    def hi(self, position: Tensor) -> Tensor: ...

    def envelope(self) -> WindowBand:
        """A window that holds the band wherever documents and real tokens begin, which shifts all positions."""
        ...


@dataclass(frozen=True)
class WindowBand:
    """`left` keys before the query's own and `right` after it, -1 for no bound."""

    left: int
    right: int

    def lo(self, position: Tensor) -> Tensor:
        return position - self.left if self.left >= 0 else position * 0 - FAR

    def hi(self, position: Tensor) -> Tensor:
        return position + self.right if self.right >= 0 else position * 0 + FAR

    def envelope(self) -> WindowBand:
        return self


@dataclass(frozen=True)
class GroupBand:
    """Groups of `size` tokens, the first of them shortened by `shift`; in a causal one no query sees a later key."""

    size: int
    shift: int
    causal: bool

    def lo(self, position: Tensor) -> Tensor:
        return (position + self.shift) // self.size * self.size - self.shift

    def hi(self, position: Tensor) -> Tensor:
        return position if self.causal else self.lo(position) + self.size - 1

    def envelope(self) -> WindowBand:
        return WindowBand(self.size - 1, 0 if self.causal else self.size - 1)
