"""Which keys of a batch are real: the mask function registered with transformers, and what packed rows look like.

No score mask is ever built. What transformers hands to the attention function as `attention_mask` is None, or what is
known of each row, int32 (B, 1, 2 or 3): the tokens of padding that it begins with, all its tokens so far, and a third
column where the cache may have empty slots. It says nothing of any layer, whose caches may hold different keys; it is
formed once a forward, without the host reading a device tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.ops.dispatch import debugging

__all__ = ["check_no_restart", "longattn_mask", "packed_cu_seqlens", "padding_of", "row_bounds"]


def longattn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Turn a 2-D padding mask and a cache's state into what is known of each row.

    Called by transformers, which fixes the arguments: lengths and offsets in tokens, `q_offset` a 0-dim tensor for
    static caches, `attention_mask` bool (B, tokens so far).

    Returns:
        int32 (B, 1, 2): tokens of padding in front, and tokens so far; (B, 1, 3): the same for a cache that may have
        empty slots; None: all keys are real.
    """
    if use_vmap:
        raise ValueError("longattn: masks that are joined to the causal one (or_mask, and_mask) are not served")
    if _is_bounds(attention_mask, batch_size):
        return attention_mask  # generate forms the masks of static caches before it calls the model
    start = None
    if attention_mask is not None:
        _check_padding_mask(attention_mask, batch_size, q_offset, q_length, kv_offset + kv_length)
        device = attention_mask.device
        if not (_may_read(attention_mask) and bool(attention_mask.all())):
            start = _first_real_key(attention_mask)  # (B,)
    total = q_offset + q_length
    growing = not isinstance(total, Tensor) and total == kv_offset + kv_length
    if growing and start is None:
        return None
    if start is None:
        start = torch.zeros(batch_size, dtype=torch.int32, device=device)
    if isinstance(total, Tensor):
        columns = [start, total.to(start.device).expand(batch_size)]
    else:
        columns = [start, start.new_full((batch_size,), total)]
    columns += [] if growing else [columns[1]]
    return torch.stack([column.to(torch.int32) for column in columns], dim=-1)[:, None]  # (B, 1, 2 or 3)


def padding_of(attention_mask: Tensor | None, batch_size: int) -> Tensor | None:
    """Read from what `longattn_mask` returned the tokens of padding in front of each row: int32 (B,), or None."""
    if attention_mask is None:
        return None
    if not _is_bounds(attention_mask, batch_size):
        raise ValueError(
            "longattn: attention_mask must be None or 2-D (B, tokens), 1 for real tokens and 0 for padding, got a "
            f"{attention_mask.ndim}-D one of shape {tuple(attention_mask.shape)}"
        )
    return attention_mask[:, 0, 0]


def row_bounds(attention_mask: Tensor | None, batch_size: int, num_keys: int) -> tuple[Tensor | None, Tensor | None]:
    """Where each row's real keys are among the last `num_keys` tokens, or, while there are fewer, in as many slots.

    Returns:
        `kv_start` and `kv_end`, each int32 (B,) or None.
    """
    start = padding_of(attention_mask, batch_size)
    if attention_mask is None or start is None:
        return None, None
    total = attention_mask[:, 0, 1]
    start = (start - (total - num_keys).clamp(min=0)).clamp(min=0)
    return start, total.clamp(max=num_keys) if attention_mask.shape[-1] == 3 else None


def packed_cu_seqlens(position_ids: Tensor, batch_size: int) -> Tensor | None:
    """Where documents packed in a batch's rows begin, as one row after the other.

    A document begins with each row, and wherever a position is not one more than the position before it, which is how
    transformers reads packed rows.

    Args:
        position_ids: integer (B, S) or (1, S).
        batch_size: B.

    Returns:
        int32 (documents + 1,): the documents' borders in the `B * S` tokens; on devices, where the host does not read
        how many there are, (B * S + 1,), with empty documents at the end. None: each row holds one document.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if _may_read(position_ids) and not bool(starts[:, 1:].any()):
        return None
    starts = starts.expand(batch_size, -1).reshape(-1)
    tokens = starts.numel()
    if _may_read(position_ids):
        borders = starts.nonzero()[:, 0]
        return torch.cat([borders, borders.new_full((1,), tokens)]).to(torch.int32)
    places = torch.arange(tokens, device=starts.device, dtype=torch.int32)
    borders = torch.where(starts, places, tokens).sort().values
    return torch.cat([borders, borders.new_full((1,), tokens)])


def check_no_restart(position_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse packed rows where a cache's earlier keys have lost their documents, or where it has empty slots.

    Args:
        position_ids: integer (B, Sq) or (1, Sq).
        attention_mask: what `longattn_mask` returned; positions before a row's first real key may be anything.
    """
    if not _may_read(position_ids):
        return
    restarts = position_ids[:, 1:] <= position_ids[:, :-1]
    if attention_mask is not None:
        start, total = padding_of(attention_mask, attention_mask.shape[0]), attention_mask[:, 0, 1]
        if start is None or attention_mask.shape[-1] == 2:
            return  # a mask and a growing cache: as in transformers, positions tell no documents apart
        places = torch.arange(1 - position_ids.shape[1], 0, device=restarts.device) + total[:, None]
        restarts = restarts & (places > start[:, None])
    if bool(restarts.any()):
        raise ValueError(
            "longattn: position_ids start again inside a row, so documents are packed in it, but the cache holds "
            "earlier tokens or empty slots; give packed rows in one call, without a static cache"
        )


def _first_real_key(mask: Tensor) -> Tensor:
    """Zeros before each row's first one: int64 (B,); all keys of a row that has none."""
    return (mask.cumsum(-1) == 0).sum(-1)


def _check_padding_mask(mask: Tensor, batch_size: int, q_offset: int | Tensor, q_length: int, slots: int) -> None:
    if mask.ndim != 2 or mask.shape[0] != batch_size:
        raise ValueError(
            f"longattn: attention_mask must be 2-D ({batch_size}, tokens), 1 for real tokens and 0 for padding, got "
            f"shape {tuple(mask.shape)}"
        )
    if not isinstance(q_offset, Tensor) and mask.shape[1] not in (
        q_offset + q_length,
        slots,
    ):
        raise ValueError(
            f"longattn: attention_mask must cover the {q_offset} tokens in the cache and the {q_length} new ones, got "
            f"{mask.shape[1]}"
        )
    if not _may_read(mask):
        return
    begins = (mask[:, 1:] & ~mask[:, :-1]).sum(-1) + mask[:, 0]
    if bool((begins > 1).any()):
        row = int((begins > 1).nonzero()[0, 0])
        raise ValueError(
            f"longattn: attention_mask must have its ones in one piece a row (padding left, right or both), got zeros "
            f"between ones in row {row}"
        )


def _is_bounds(mask: Tensor | None, batch_size: int) -> bool:
    return mask is not None and mask.dtype == torch.int32 and mask.ndim == 3 and mask.shape[:2] == (batch_size, 1)


def _may_read(values: Tensor) -> bool:
    """Whether the host may read a tensor's values: those of plain CPU tensors, and of any device's when debugging."""
    if torch.compiler.is_compiling() or type(values) is not Tensor or values.device.type == "meta":
        return False
    return values.device.type == "cpu" or debugging()
