"""One call of sharded attention: its arguments read, checked, and turned into those of the plain ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longattn.distributed.exchange import Exchange
from longattn.distributed.plan import HeadSet, Need, check_offsets, head_sets, needs_of
from longattn.distributed.positions import check_positions
from longattn.ops.attention import Bands
from longattn.ops.checks import check_attention

__all__ = ["Call", "Pattern", "values_of"]


@dataclass(frozen=True)
class Pattern:
    """One kind of band: the plain op that attends by it, and how its arguments are read.

    Args:
        op: name of the plain op.
        names: of its band's arguments, as the public function calls them.
        make_bands: (query, *band arguments) -> the bands.
        check_band: (query, *band arguments) -> None; raises ValueError.
        of_heads: (band arguments, first head, stop) -> the arguments for those heads.
    """

    op: str
    names: tuple[str, ...]
    make_bands: Callable[..., Bands]
    check_band: Callable[..., None]
    of_heads: Callable[[tuple[Any, ...], int, int], tuple[Any, ...]]


class Call:
    """One call's arguments behind query, key and value, read."""

    def __init__(self, pattern: Pattern, query: Tensor, key: Tensor, args: tuple[Any, ...]) -> None:
        self.pattern = pattern
        *band, offsets, name, scale, softcap, sinks, sink_logits, cu_seqlens, kv_start, position_ids = args
        self.band = tuple(band)
        self.group: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(name)
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        length = query.shape[2]
        self.equal = not offsets
        self.offsets = tuple(offsets) or tuple(int(length) * rank for rank in range(self.ranks + 1))
        self.scale, self.softcap, self.sinks, self.sink_logits = scale, softcap, sinks, sink_logits
        self.cu_seqlens, self.kv_start, self.position_ids = cu_seqlens, kv_start, position_ids
        self.first = self.offsets[self.rank] if len(self.offsets) == self.ranks + 1 else 0

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Check what this rank can see alone."""
        op = self.pattern.op
        check_attention(op, query, key, value, self.scale, self.softcap, self.sinks, self.sink_logits)
        self.pattern.check_band(query, *self.band)
        if key.shape[2] != query.shape[2]:
            raise ValueError(f"{op}: key must have the shard's {query.shape[2]} tokens like query, got {key.shape[2]}")
        check_offsets(op, self.offsets, self.ranks, self.rank, query.shape[2])
        for name, x in (("cu_seqlens", self.cu_seqlens), ("kv_start", self.kv_start)):
            if x is not None and x.dtype != torch.int32:
                raise TypeError(f"{op}: {name} must be an int32 tensor, got {x.dtype}")
        if self.kv_start is not None and (self.sinks or self.cu_seqlens is not None or self.position_ids is not None):
            raise ValueError(
                f"{op}: kv_start can't be given together with sink_tokens, cu_seqlens or position_ids over ranks; pad "
                "on the right"
            )
        if self.cu_seqlens is None:
            return
        if query.shape[0] != 1 or self.cu_seqlens.dim() != 1 or len(self.cu_seqlens) < 1:
            raise ValueError(
                f"{op}: cu_seqlens must be (documents + 1,) for batch size 1, got {tuple(self.cu_seqlens.shape)} and "
                f"batch size {query.shape[0]}"
            )

    def check_values(self, query: Tensor) -> None:
        """Check borders and positions where the host may read them, and that it may where it must."""
        self._check_documents()
        if self.position_ids is not None:
            op, length = self.pattern.op, query.shape[2]
            check_positions(op, self.position_ids, self.cu_seqlens, self.first, length, self.group)

    def _check_documents(self) -> None:
        op, documents = self.pattern.op, self.documents
        if documents is None:
            if self.cu_seqlens is not None and self.sinks:
                raise ValueError(f"{op}: cu_seqlens must be on the CPU where sink_tokens are given over ranks")
            return
        if documents[0] != 0 or documents[-1] != self.offsets[-1] or documents != sorted(documents):
            shown = documents if len(documents) <= 8 else f"{documents[:4]} .. {documents[-4:]}"
            raise ValueError(
                f"{op}: cu_seqlens must be borders in the whole sequence, rising from 0 to its {self.offsets[-1]} "
                f"tokens, got {shown}"
            )

    @property
    def documents(self) -> list[int] | None:
        """Borders that the host may read; None where there are none."""
        borders = values_of(self.cu_seqlens)
        return borders if isinstance(borders, list) else None

    def signature(self, query: Tensor, key: Tensor) -> dict[str, Any]:
        """What all ranks must be given alike."""
        (batch, heads, length, width), kv_heads = query.shape, key.shape[1]
        return {
            "shape of query and key (batch size, heads, KV heads, head_dim)": [batch, heads, kv_heads, width],
            "dtype": str(query.dtype),
            "device": query.device.type,
            **dict(zip(self.pattern.names, self.band, strict=True)),
            "offsets (equal shards where not given)": ["equal", length] if self.equal else self.offsets,
            "scale": self.scale,
            "softcap": self.softcap,
            "sink_tokens": self.sinks,
            "sink_logits": self.sink_logits is not None,
            "cu_seqlens": values_of(self.cu_seqlens),
            "kv_start": values_of(self.kv_start),
        }

    def exchanges(self, query: Tensor, key: Tensor) -> list[Exchange]:
        """One for each head set of which a rank needs something."""
        documents = self.documents
        unread = self.kv_start is not None or (self.cu_seqlens is not None and documents is None)
        found = []
        for heads in self._head_sets(query, key):
            bands = tuple(band.envelope() for band in heads.bands) if unread else heads.bands
            needs = tuple(needs_of(bands, self.offsets, r, self.sinks, documents) for r in range(self.ranks))
            found.append(Exchange(heads, needs, self.offsets, self.rank))
        return [exchange for exchange in found if not exchange.idle]

    def _head_sets(self, query: Tensor, key: Tensor) -> tuple[HeadSet, ...]:
        bands, shifts = self.pattern.make_bands(query, *self.band)
        return head_sets(query.shape[1], key.shape[1], shifts, dict(bands))

    def remote_size(self, query: Tensor, key: Tensor) -> int:
        """Numbers that what is received can have at most, whatever the values of index tensors."""
        ragged = self.cu_seqlens is not None or self.kv_start is not None
        total = 0
        for heads in self._head_sets(query, key):
            bands = tuple(band.envelope() for band in heads.bands) if ragged else heads.bands
            needs = needs_of(bands, self.offsets, self.rank, 0 if ragged else self.sinks)
            tokens = sum(need.tokens for need in needs) + (self.sinks if ragged else 0)
            total += tokens * (heads.kv[1] - heads.kv[0])
        return total * 2 * key.shape[0] * key.shape[3]

    def own(self, query: Tensor) -> tuple[Any, ...]:
        """The plain op's arguments for the shard's own keys."""
        return (*self.band, *self._options(self.first, self.first, query, query.shape[2], self.sinks, self.sink_logits))

    def far(self, need: Need, heads: HeadSet, query: Tensor) -> tuple[Any, ...]:
        """The plain op's arguments for keys of other ranks."""
        band = self.pattern.of_heads(self.band, *heads.query)
        sinks = self.sinks if need.sinks else 0
        return (*band, *self._options(need.queries[0], need.keys[0], query, need.tokens, sinks, None))

    def _options(
        self, query_start: int, key_start: int, query: Tensor, num_keys: int, sinks: int, sink_logits: Tensor | None
    ) -> tuple[Any, ...]:
        """A border behind the keys at hand says no more than the last of them."""
        last = key_start + num_keys
        cu_seqlens, kv_start = self.cu_seqlens, self.kv_start
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(query.device)
            if query_start == key_start == 0:
                cu_seqlens = cu_seqlens.clamp(max=last)
        if kv_start is not None:
            kv_start = kv_start.to(query.device).clamp(max=last)
        return self.scale, self.softcap, sinks, sink_logits, cu_seqlens, kv_start, None, query_start, key_start

    def queries(self, need: Need) -> slice:
        return slice(need.queries[0] - self.first, need.queries[1] - self.first)


def values_of(index: Tensor | None) -> list[int] | str | None:
    """What the host may know of an index tensor."""
    if index is None:
        return None
    return index.tolist() if index.device.type == "cpu" else f"a tensor of {len(index)} on {index.device.type}"
