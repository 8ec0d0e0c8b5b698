"""A long prompt read over ranks, its cache brought to one of them that decodes; changes with what a cache holds."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from longattn.distributed.agreement import agree, refuse
from longattn.distributed.attention import Group, process_group
from longattn.distributed.batch import shard_batch
from longattn.distributed.messages import send
from longattn.distributed.style import shards_of
from longattn.hf.caches import BandLayer, held_of
from longattn.hf.families import attention_modules, serving_patterns
from longattn.pattern import Pattern

__all__ = ["prefill"]

OP = "prefill"
Range = tuple[int, int]


@torch.no_grad()
def prefill(model: nn.Module, input_ids: Tensor, group: Group, *, to: int = 0) -> tuple[Tensor, Cache] | None:
    """Read a prompt over ranks; one rank gets what it needs to decode on.

    A rank keeps of its shard what later queries of each layer see: of windows and groups a few tokens, of layers that
    see all keys all of them, so that the cache of those must fit on the rank that decodes.

    Args:
        model: a causal language model of transformers that was given to `parallelize`, in eval mode.
        input_ids: (B, N), the same on all ranks; without padding.
        group: the ranks that hold the shards.
        to: the rank of the group that decodes.

    Returns:
        On rank `to`: logits (B, vocabulary) of the token after the prompt, and the cache, ready for the model's forward
        and for `generate` once the model was given to `release`. None on the others.

    Raises:
        ValueError, TypeError: an argument does not fit, or differs between the ranks; on every rank.

    Example:
        >>> found = prefill(model, ids, mesh["cp"])  # doctest: +SKIP
        >>> release(model)  # doctest: +SKIP
    """
    pg = process_group(OP, group)
    rank, ranks = dist.get_rank(pg), dist.get_world_size(pg)
    device = input_ids.device.type if isinstance(input_ids, Tensor) else "cpu"
    try:
        patterns = _check(model, input_ids, pg, to, ranks)
    except (TypeError, ValueError) as error:
        refuse(pg, device, OP, error)
    agree(
        pg, "forward", device, OP, {"to": to, "input_ids": list(input_ids.shape), "patterns": list(map(str, patterns))}
    )
    tokens, shard = input_ids.shape[1], shard_batch({"input_ids": input_ids}, pg)
    length = shard["input_ids"].shape[1]
    own = (rank * length, min((rank + 1) * length, tokens))
    kept = [_Needed([_common(held, own) for held in held_of(p, tokens)], own[0]) for p in patterns]
    cache = DynamicCache()
    cache.layers = list(kept)
    last, index = divmod(tokens - 1, length)
    logits = _logits(model, shard, cache, index if rank == last else length - 1)
    shards = [(r * length, min((r + 1) * length, tokens)) for r in range(ranks)]
    whole = DynamicCache(config=model.config)  # type: ignore[arg-type]
    for pattern, mine, layer in zip(patterns, kept, whole.layers, strict=True):
        counts = [_tokens([_common(held, other) for held in held_of(pattern, tokens)]) for other in shards]
        rows = _collect(mine.rows(), counts, to, pg)  # (held, 2, B, Hkv, D)
        if rank == to:
            key, value = rows.permute(1, 2, 3, 0, 4)
            _load(layer, key, value, tokens)
    found = _collect(logits, [int(r == last) for r in range(ranks)], to, pg)
    return (found[0], whole) if rank == to else None


class _Needed(DynamicLayer):
    """A shard's layer of a cache that keeps, of the one call that it sees, a few ranges of tokens.

    Args:
        ranges: positions to keep, all in the shard.
        first: the shard's first position.
    """

    def __init__(self, ranges: list[Range], first: int) -> None:
        super().__init__()
        self.ranges = [(a - first, b - first) for a, b in ranges if a < b]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.kept = [torch.stack([key_states[:, :, a:b], value_states[:, :, a:b]]) for a, b in self.ranges]
        self.kept.append(torch.stack([key_states[:, :, :0], value_states[:, :, :0]]))
        return key_states, value_states

    def rows(self) -> Tensor:
        """(tokens, 2, B, Hkv, D)."""
        return torch.cat(self.kept, dim=3).permute(3, 0, 1, 2, 4).contiguous()


def _check(model: nn.Module, input_ids: Tensor, group: dist.ProcessGroup, to: int, ranks: int) -> list[Pattern]:
    modules = attention_modules(model)
    if not modules or any(getattr(shards_of(module), "group", None) != group.group_name for module in modules):
        raise ValueError(f"{OP}: model must have been given to parallelize with this group, got {type(model).__name__}")
    if model.training:
        raise ValueError(f"{OP}: model must be in eval mode, got training mode")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.shape[1]:
        shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"{OP}: input_ids must be (B, N) with N >= 1, got {shape}")
    if isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < ranks:
        raise ValueError(f"{OP}: to must be one of the group's ranks, 0 to {ranks - 1}, got {to!r}")
    return serving_patterns(model.config, OP)  # type: ignore[arg-type]


def _logits(model: nn.Module, shard: dict[str, Any], cache: Cache, index: int) -> Tensor:
    """(1, B, vocabulary) of the shard's token `index`; no others are formed where the model can leave them out."""
    forward = getattr(model, "get_base_model", lambda: model)().forward
    some = "logits_to_keep" in inspect.signature(forward).parameters
    more = dict(logits_to_keep=torch.tensor([index], device=shard["input_ids"].device)) if some else {}
    logits = model(**shard, past_key_values=cache, use_cache=True, **more).logits
    return logits[:, 0 if some else index][None].contiguous()


def _collect(rows: Tensor, counts: list[int], to: int, group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows, by rank, on rank `to`; nothing on the others."""
    rank, ranks = dist.get_rank(group), len(counts)
    received = counts if rank == to else [0] * ranks
    rows = rows[: counts[rank]]
    got = rows.new_empty((sum(received), *rows.shape[1:]))
    sent = [counts[rank] if other == to else 0 for other in range(ranks)]
    return send(got, rows.contiguous(), received, sent, group).arrived()


def _load(layer: Any, keys: Tensor, values: Tensor, tokens: int) -> None:
    keys, values = keys.contiguous(), values.contiguous()
    if isinstance(layer, BandLayer):
        layer.load(keys, values, tokens)
    else:
        layer.update(keys, values)


def _common(one: Range, other: Range) -> Range:
    start = max(one[0], other[0])
    return start, max(start, min(one[1], other[1]))


def _tokens(ranges: list[Range]) -> int:
    return sum(b - a for a, b in ranges)
