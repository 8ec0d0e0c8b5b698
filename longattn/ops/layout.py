"""The order of strides that outputs and gradients take; changes when an op's memory layout does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["empty_in_order", "empty_like_order", "is_token_major"]


def is_token_major(tensor: Tensor) -> bool:
    """Whether a (B, H, S, D) tensor lies in memory as (B, S, H, D)."""
    return tensor.dim() == 4 and bool(tensor.stride(1) < tensor.stride(2))


def empty_in_order(like: Tensor, shape: Sequence[int], token_major: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of `shape` (B, H, S, D) on `like`'s device, in (B, S, H, D) memory if `token_major`."""
    dtype = like.dtype if dtype is None else dtype
    if not token_major:
        return like.new_empty(shape, dtype=dtype)
    batch, heads, tokens, dim = shape
    return like.new_empty((batch, tokens, heads, dim), dtype=dtype).transpose(1, 2)


def empty_like_order(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor with `tensor`'s shape, device and order of strides; what kernels and fakes return.

    It is (B, S, H, D) in memory where a 4-dim `tensor` is, and contiguous otherwise, whatever gaps `tensor` has.

    Args:
        tensor: (B, H, S, D), or any other number of dims.
        dtype: of the result; the tensor's own by default.
    """
    return empty_in_order(tensor, tensor.shape, is_token_major(tensor), dtype)
