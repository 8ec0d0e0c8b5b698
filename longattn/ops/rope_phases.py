"""Exact rotary phases: where tokens stand, and the cosines and sines of position times frequency."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["exact_cos_sin", "positions_of"]


def exact_cos_sin(
    positions: Tensor, inv_freq: Tensor, attention_scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (*positions.shape, rotary_dim / 2): product, function and scaling in float64, rounded once."""
    phases = positions.to(torch.float64).unsqueeze(-1) * inv_freq.to(
        torch.float64
    )  # (*positions.shape, rotary_dim / 2)
    scaling = 1.0 * attention_scaling
    return (phases.cos() * scaling).to(dtype), (phases.sin() * scaling).to(dtype)


def positions_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The positions (S,) of packed documents' tokens, which count from the start of each.

    Args:
        cu_seqlens: (documents + 1,) int32 bounds; a token outside of all documents counts from the nearest one.
        tokens: S.
    """
    token = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:-1].contiguous(), token, right=True)  # of the bounds between documents
    return token - cu_seqlens[document]
