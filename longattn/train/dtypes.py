"""The dtype that a run's weights are stored in: what the checkpoint has, as long as that holds what was learnt."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from longattn.shards import TORCH_DTYPES, Shards

__all__ = ["dtype_of_weights", "dtype_that_holds"]


def dtype_of_weights(source: Path) -> torch.dtype:
    """The dtype of most numbers, for configs that name none."""
    sizes = dict.fromkeys(TORCH_DTYPES, 0)
    for tensor in Shards.open(source):
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += math.prod(tensor.shape)
    return TORCH_DTYPES[max(sizes, key=sizes.__getitem__)]


def dtype_that_holds(model: nn.Module, dtype: torch.dtype) -> tuple[torch.dtype, list[str]]:
    """The dtype to store a model in, so that no finite weight becomes infinite.

    Args:
        model: trained, in float32 where it learnt.
        dtype: what its checkpoint was stored in.

    Returns:
        `dtype`, or float32 where a weight is beyond it, and then a sentence that says so.
    """
    for name, weights in model.state_dict().items():
        beyond = weights.isfinite() & weights.to(dtype).isinf()
        if weights.is_floating_point() and beyond.any():
            short = str(dtype).removeprefix("torch.")
            return torch.float32, [
                f"The checkpoint is in float32, not {short} as before: {name} holds {weights[beyond][0].item():g}, "
                f"beyond {short}'s {torch.finfo(dtype).max:g}."
            ]
    return dtype, []
