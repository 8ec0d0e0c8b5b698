"""Cutting a batch into the shards of a sequence: labels, positions, padding and documents before the cut."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longattn.distributed.agreement import agree, refuse
from longattn.distributed.attention import Group, process_group
from longattn.distributed.positions import positions_of

__all__ = ["shard_batch"]

IGNORED = -100  # labels that count for no loss
CUT = ("input_ids", "labels", "shift_labels")
READ = ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
WHOLE = ("num_items_in_batch", "max_length_q", "max_length_k")
OP = "shard_batch"


def shard_batch(
    batch: Mapping[str, Any], group: Group, *, pad_token_id: int = 0, pad_to_multiple_of: int = 1
) -> dict[str, Any]:
    """Cut a batch of whole sequences to this rank's shard of their tokens, ready for a transformers model.

    Labels are shifted before the cut, since a shard's last token predicts the next shard's first; positions count in
    the whole sequence; the end is padded until all shards are equal, which causal patterns need no mask for. The loss
    of a rank is its share of the whole batch's: the ranks' losses add up to it. Where gradients are averaged over dp
    and cp ranks (FSDP), scale the loss by cp, or, with `num_items_in_batch` summed over dp, by dp cp.

    Args:
        batch: the same on all ranks of the group: input_ids (B, N); labels, shift_labels, attention_mask (ones, then
            zeros), position_ids (1 or B, N) where there are any; cu_seq_lens_q (documents + 1,) or position_ids that
            start again for packed documents (B = 1).
        group: the ranks that hold the shards, as for `window_attention`.
        pad_token_id: input of padded tokens; nothing real sees it.
        pad_to_multiple_of: tokens that each shard's length divides by.

    Returns:
        input_ids, position_ids (B, S), with labels also labels, shift_labels (B, S) and num_items_in_batch, the tokens
        of the whole batch that count; for packed documents cu_seq_lens_q, their borders in the padded sequence, int32
        on the CPU. What is no tensor as given.

    Raises:
        ValueError, TypeError: the batch does not fit, or, on the CPU, differs between the ranks; on every rank.

    Example:
        >>> loss = model(**shard_batch(batch, mesh["cp"]), use_cache=False).loss  # doctest: +SKIP
    """
    pg = process_group(OP, group)
    ranks, rank = dist.get_world_size(pg), dist.get_rank(pg)
    try:
        ids = _check(batch)
        if not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
            raise ValueError(f"{OP}: pad_to_multiple_of must be an int >= 1, got {pad_to_multiple_of!r}")
        rows, length = ids.shape
        shard = -(-length // (ranks * pad_to_multiple_of)) * pad_to_multiple_of
        more = shard * ranks - length
        borders = _borders(batch, rows, length, more)
    except (TypeError, ValueError) as error:
        refuse(pg, _host(pg), OP, error)
    _compare(pg, batch, ids, pad_to_multiple_of)
    own = slice(rank * shard, (rank + 1) * shard)
    output: dict[str, Any] = {"input_ids": _cut(ids, more, pad_token_id, own)}
    labels, shifted = batch.get("labels"), batch.get("shift_labels")
    if labels is not None or shifted is not None:
        if shifted is None:
            shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)  # type: ignore[index]
        output["labels"] = _cut(shifted if labels is None else labels, more, IGNORED, own)
        output["shift_labels"] = _cut(shifted, more, IGNORED, own)
        output["num_items_in_batch"] = (shifted != IGNORED).sum()
    positions = positions_of(own.start, own.stop, borders, ids.device)
    output["position_ids"] = positions.expand(rows, -1).contiguous()
    if borders is not None:
        output["cu_seq_lens_q"] = output["cu_seq_lens_k"] = borders
    rest = {name: x for name, x in batch.items() if x is not None and (name in WHOLE or not isinstance(x, Tensor))}
    return output | rest


def _cut(x: Tensor, more: int, value: int, own: slice) -> Tensor:
    return torch.nn.functional.pad(x, (0, more), value=value)[:, own].contiguous()


def _check(batch: Mapping[str, Any]) -> Tensor:
    """Check all but the documents; returns input_ids."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise TypeError(f"{OP}: input_ids must be a (B, N) tensor, got {type(ids).__name__}")
    for name, x in batch.items():
        if name in WHOLE or x is None:
            continue
        if name not in (*CUT, *READ):
            if isinstance(x, Tensor):
                raise ValueError(f"{OP}: tensors in batch must be {', '.join((*CUT, *READ, *WHOLE))}, got {name!r} too")
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor, got {type(x).__name__}")
        fits = {"position_ids": (tuple(ids.shape), (1, ids.shape[1]))}.get(name, (tuple(ids.shape),))
        if not name.startswith("cu_seq_lens") and tuple(x.shape) not in fits:
            raise ValueError(f"{OP}: {name} must be {tuple(ids.shape)} like input_ids, got {tuple(x.shape)}")
    mask = batch.get("attention_mask")
    if mask is not None and bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()):
        raise ValueError(
            f"{OP}: attention_mask must be ones and then zeros (padding_side='right'), got zeros before ones"
        )
    return ids


def _host(group: dist.ProcessGroup) -> str:
    """How ranks compare what the host holds: by messages where the group has any for the CPU, else by its store."""
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return "store"
    return "cpu"


def _compare(group: dist.ProcessGroup, batch: Mapping[str, Any], ids: Tensor, multiple: int) -> None:
    """Compare shapes between the ranks, and the values that are on the CPU."""
    signature: dict[str, Any] = {"shape of input_ids": list(ids.shape), "pad_to_multiple_of": multiple}
    for name in (*CUT, *READ):
        x = batch.get(name)
        known = isinstance(x, Tensor) and x.device.type == "cpu"
        signature[name] = _digest(x) if known else None if x is None else "on a device"  # type: ignore[arg-type]
    agree(group, "forward", _host(group), OP, signature)


def _digest(x: Tensor) -> str:
    return f"{tuple(x.shape)}, sha256 {hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16]}"


def _borders(batch: Mapping[str, Any], rows: int, length: int, more: int) -> Tensor | None:
    """Borders of packed documents, the padding a document of its own: int32 on the CPU; None where none are packed."""
    given, positions = batch.get("cu_seq_lens_q"), batch.get("position_ids")
    if given is not None:
        borders = given.cpu().to(torch.int32)
    elif positions is not None:
        starts = positions[:, 1:] != positions[:, :-1] + 1  # (1 or B, N - 1)
        if bool((positions[:, 0] != 0).any()) or bool((positions[:, 1:][starts] != 0).any()):
            raise ValueError(f"{OP}: position_ids must count from 0 in the sequence, or in each of its documents")
        if not bool(starts.any()):
            return None
        inner = starts.any(0).nonzero()[:, 0].cpu() + 1
        borders = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), length)]).to(torch.int32)
    else:
        return None
    if rows != 1:
        raise ValueError(f"{OP}: packed documents need one row (B = 1), got {rows}")
    if borders.dim() != 1 or len(borders) < 1 or int(borders[0]) != 0 or int(borders[-1]) != length:
        raise ValueError(f"{OP}: cu_seq_lens_q must rise from 0 to the {length} tokens, got {borders.tolist()[:8]}")
    return torch.cat([borders, borders[-1:] + more]) if more else borders
