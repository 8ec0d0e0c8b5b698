"""The float64 reference of single query rows and key columns, for texts that are too long for a dense one.

A row's output, log-sum-exp and query gradient need the keys that it sees; a column's gradients need the queries that
see it, and all keys of those. Both come from blocks of queries, which are small where bands are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from reference import visible_mask
from torch import Tensor

__all__ = ["Causal", "Head"]

BLOCK = 2048  # queries of a block


@dataclass(frozen=True)
class Causal:
    """A causal window of `window` keys, the query's own included, or groups of `group`; with `sinks` first keys."""

    window: int = 0
    group: int = 0
    sinks: int = 0

    def first_key(self, query: int, shift: int) -> int:
        first = query - self.window + 1 if self.window else (query + shift) // self.group * self.group - shift
        return max(0, first)

    def queries(self, key: int, shift: int, tokens: int) -> tuple[int, int]:
        """The queries [begin, end) that see a key."""
        if key < self.sinks:
            return key, tokens
        end = key + self.window if self.window else ((key + shift) // self.group + 1) * self.group - shift
        return key, min(tokens, end)

    def mask(self, first: int, last: int, key: int, keys: int, shift: int) -> Tensor:
        """Which of `keys` keys from `key` on the queries [first, last) see: bool (last - first, keys)."""
        band = dict(window=(self.window - 1, 0)) if self.window else dict(group=self.group, shifts=[shift])
        return visible_mask(
            1, 1, last - first, keys, sinks=self.sinks, query_start=first, key_start=key, **band
        )[0, 0]  # fmt: skip


@dataclass(frozen=True)
class Head:
    """One query head over its keys: query, key, value and the gradient of its output, each (S, D), on any device."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    band: Causal
    shift: int
    dtype: torch.dtype = torch.float64

    def _block(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The queries [first, last): their keys' numbers, probabilities, gradients of logits, log-sum-exp."""
        low = self.band.first_key(first, self.shift)
        sinks = min(self.band.sinks, low)  # those before the band
        with self.query.device:
            numbers = torch.cat([torch.arange(sinks), torch.arange(low, last)])
            masks = [self.band.mask(first, last, 0, sinks, self.shift)] if sinks else []
            mask = torch.cat([*masks, self.band.mask(first, last, low, last - low, self.shift)], -1)
        query, grad = self.query[first:last].to(self.dtype), self.grad[first:last].to(self.dtype)
        key, value = self.key[numbers].to(self.dtype), self.value[numbers].to(self.dtype)
        logits = (query @ key.T * self._scale).masked_fill(~mask, -math.inf)
        weights = torch.softmax(logits, -1)
        slopes = grad @ value.T
        slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True))
        return numbers, weights, slopes, torch.logsumexp(logits, -1)

    @property
    def _scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    def row(self, query: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one query: output (D,), log-sum-exp (), gradient of the query (D,)."""
        numbers, weights, slopes, lse = self._block(query, query + 1)
        value, key = self.value[numbers].to(self.dtype), self.key[numbers].to(self.dtype)
        return (weights @ value)[0], lse[0], (slopes @ key * self._scale)[0]

    def column(self, key: int) -> tuple[Tensor, Tensor]:
        """This head's share of one key's gradients: of key and value, each (D,)."""
        begin, end = self.band.queries(key, self.shift, len(self.query))
        grad_key = torch.zeros(self.key.shape[-1], dtype=torch.float64, device=self.key.device)
        grad_value = grad_key.clone()
        for first in range(begin, end, BLOCK):
            last = min(end, first + BLOCK)
            numbers, weights, slopes, _ = self._block(first, last)
            column = (numbers == key).nonzero()[0, 0]
            grad_key += (slopes[:, column] @ self.query[first:last].to(self.dtype)).double() * self._scale
            grad_value += (weights[:, column] @ self.grad[first:last].to(self.dtype)).double()
        return grad_key, grad_value
