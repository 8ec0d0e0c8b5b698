"""LongLoRA's rolled attention, for comparison only: its first half group sees the end of the text.

Half of the heads are rolled by half a group, attended to in groups, and rolled back, as in the paper's code without
FlashAttention. What the roll carries from the text's end to its beginning lands in one group with the last tokens, and
comes after them there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "rolled_groups"
GROUP = "rolled_group_size"  # the config's attribute that holds the tokens of a group


def rolled_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value (B, H, S, D) with as many heads each and S a multiple of the group; out (B, S, H, D)."""
    size = getattr(module.config, GROUP)
    batch, heads, tokens, width = query.shape
    if key.shape != query.shape or tokens % size:
        raise ValueError(
            f"rolled_attention: key must have the shape of query and groups of {size} fit, got {tuple(query.shape)} "
            f"and {tuple(key.shape)}"
        )
    grouped = [_rolled(x, -(size // 2)).reshape(batch, heads, tokens // size, size, width) for x in (query, key, value)]
    out = scaled_dot_product_attention(*grouped, is_causal=True, scale=scaling)
    out = _rolled(out.reshape(batch, heads, tokens, width), size // 2)
    return out.transpose(1, 2), None


def _rolled(x: torch.Tensor, by: int) -> torch.Tensor:
    """(B, H, S, D), the second half of the heads rolled along the tokens."""
    still, moved = x.chunk(2, dim=1)
    return torch.cat([still, moved.roll(by, dims=2)], dim=1)


AttentionInterface.register(NAME, rolled_attention)
