"""Models whose caches drop keys, texts far longer than their windows, and decoding a chunk at a time."""

from __future__ import annotations

import functools

import torch
from hf_models import LAYERS, build, tokens, under_eager
from torch import Tensor

from longattn.pattern import parse_patterns
from longattn.plan import Plan
from longattn.surgery import extend

LONG = 150
MIXED = "window:1+sinks:1, group:5+shift, full, window:40"
PLANS = ("window:6", "window:20+sinks:3", "group:7", "group:8+shift:3", MIXED)


@functools.cache
def extended(plan: str, family: str = "llama"):
    model = build(family)
    extend(model, None, Plan(attention=plan, rope={"rope_type": "linear", "factor": 4.0}))
    return model, under_eager(model, parse_patterns(plan, LAYERS))


def padded(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of LONG tokens with padding in front: ids, mask, position ids, and padding a row."""
    ids, start = tokens(len(lengths), LONG), torch.tensor(lengths, dtype=torch.int32)
    mask = (torch.arange(LONG) >= start[:, None]).long()
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), start


def stepwise(model, ids, mask, positions, cache, edges):
    """Logits of all tokens, a chunk at a time."""
    logits = []
    for start, end in zip(edges, edges[1:], strict=False):
        part = slice(start, end)
        more = {} if mask is None else dict(attention_mask=mask[:, :end], position_ids=positions[:, part])
        logits.append(model(ids[:, part], past_key_values=cache, use_cache=True, **more).logits)
    return torch.cat(logits, 1)


def held_tokens(cache) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]
