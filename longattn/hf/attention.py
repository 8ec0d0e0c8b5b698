"""The attention function registered with transformers: the pattern that a layer has now, and the op that serves it."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin

from longattn.hf.caches import band_layer_of
from longattn.hf.families import config_of, family_of, layer_of
from longattn.hf.masks import check_no_restart, packed_cu_seqlens, padding_of, row_bounds
from longattn.pattern import Pattern

__all__ = ["calls_seen", "longattn_attention", "pattern_now"]

_seen: ContextVar[list[tuple[nn.Module, Pattern]] | None] = ContextVar("longattn_seen", default=None)
_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__  # a decorator's code is that of all that it decorates


def longattn_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by the pattern that the plan gives to this layer.

    Called by transformers, which fixes the arguments: query (B, Hq, Sq, D), key and value (B, Hkv, Sk, D) with the
    cache's keys before the new ones, `attention_mask` as `longattn_mask` returns it, `s_aux` (Hq,) learnt sink logits.
    Documents packed in a row are told apart by `cu_seq_lens_q`, else by `position_ids` where no mask was given (with a
    mask they are not, as in transformers).

    Returns:
        The output (B, Sq, Hq, D), and None for the weights, which are never formed.
    """
    if dropout:
        raise ValueError(
            f"longattn: attention_dropout must be 0.0 in training, got {dropout}; set config.attention_dropout"
        )
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError("longattn: every pattern is causal, got is_causal=False")
    if kwargs.get("output_attentions"):
        raise ValueError("longattn: output_attentions must be False: attention weights are never formed, got True")
    pattern = pattern_now(module)
    seen = None if torch.compiler.is_compiling() else _seen.get()
    if seen is not None:
        seen.append((module, pattern))
    batch, _, sq, _ = query.shape
    shared: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sink_logits": s_aux}
    shards = getattr(module, "longattn_shards", None)
    if shards is not None:  # longattn.distributed: this rank's shard of a longer sequence
        rows = dict(attention_mask=attention_mask, position_ids=position_ids, cu_seqlens=cu_seq_lens_q)
        return shards.attend(pattern, query, key, value, **rows, **shared).transpose(1, 2), None
    sk = key.shape[2]
    cu_seqlens = _documents(position_ids, cu_seq_lens_q, cu_seq_lens_k, batch, sq, sk, attention_mask)
    if cu_seqlens is None:
        kv_start, kv_end = _real_keys(key, attention_mask, batch, pattern)
        out = pattern.attend(query, key, value, kv_start=kv_start, kv_end=kv_end, **shared)
        _forget(key, attention_mask, batch)
        return out.transpose(1, 2), None
    folded = [_fold(tensor) for tensor in (query, key, value)]  # (1, H, B * S, D)
    out = pattern.attend(*folded, cu_seqlens=cu_seqlens, **shared)
    _forget(key, attention_mask, batch)
    return out.transpose(1, 2).reshape(batch, sq, -1, out.shape[-1]), None


def pattern_now(module: nn.Module) -> Pattern:
    """The pattern of an attention module: the training one in training outside `generate`, else the serving one.

    Without a plan it is the model's own, so that `attn_implementation="longattn"` serves an unchanged model.
    """
    config, layer = config_of(module), layer_of(module)
    record = getattr(config, "longattn", None)
    if not record or "attention" not in record:
        return family_of(config, "longattn").patterns_of(config)[layer]
    layers = record["attention"]
    if module.training and record["train_attention"] != layers and not _inside_generate():
        layers = record["train_attention"]
    if layer >= len(layers):
        raise ValueError(
            f"longattn: config.longattn has patterns of {len(layers)} layers, and this is layer {layer}; extend the "
            "model with an attention part anew"
        )
    return Pattern(**layers[layer])


@contextlib.contextmanager
def calls_seen() -> Iterator[list[tuple[nn.Module, Pattern]]]:
    """Collect the (attention module, pattern) of every call of the attention function in this thread."""
    calls: list[tuple[nn.Module, Pattern]] = []
    token = _seen.set(calls)
    try:
        yield calls
    finally:
        _seen.reset(token)


def _inside_generate() -> bool:
    """Whether `generate` is among the callers.

    transformers gives the model no sign of it, and a forward without gradients in training mode may as well be the
    first pass of reentrant checkpointing. `generate` disables gradients, so a step that records them needs no look.
    """
    return not torch.is_grad_enabled() and _generate_is_calling()


@torch.compiler.disable(reason="longattn: whether generate calls is not seen in one graph: call model.eval() first")
def _generate_is_calling() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _GENERATE:
            return True
        frame = frame.f_back
    return False


def _real_keys(
    key: Tensor, attention_mask: Tensor | None, batch: int, pattern: Pattern
) -> tuple[Tensor | None, Tensor | None]:
    """`kv_start` and `kv_end` of each row among the keys that this layer's cache holds."""
    layer = band_layer_of(key)
    if layer is None:
        return row_bounds(attention_mask, batch, key.shape[2])
    if layer.has_dropped and not layer.serves(pattern):
        raise ValueError(
            f"longattn: a layer attends by {pattern}, but its cache has dropped what {layer.pattern} does not see; "
            "call model.eval() before decoding, and begin with a new cache where a plan has changed the model since"
        )
    starts = padding_of(attention_mask, batch)
    return None if starts is None else layer.first_real_keys(starts), None


def _forget(key: Tensor, attention_mask: Tensor | None, batch: int) -> None:
    """Have a cache that holds only what its pattern sees drop the rest, now that it was attended to."""
    layer = band_layer_of(key)
    if layer is not None:
        layer.attended(padding_of(attention_mask, batch))


def _documents(
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    batch: int,
    sq: int,
    sk: int,
    attention_mask: Tensor | None,
) -> Tensor | None:
    """Borders of the documents packed in the batch's rows, laid one after the other; None where each row is one."""
    if cu_seq_lens_q is not None:
        if batch != 1 or sq != sk or attention_mask is not None:
            raise ValueError(
                "longattn: cu_seq_lens_q needs one row (B = 1), no attention_mask and no earlier tokens in the cache, "
                f"got B = {batch}, {sq} queries, {sk} keys, {'no' if attention_mask is None else 'a'} mask"
            )
        if cu_seq_lens_k is not None and cu_seq_lens_k.shape != cu_seq_lens_q.shape:
            raise ValueError(
                f"longattn: cu_seq_lens_k must be cu_seq_lens_q, got shapes {tuple(cu_seq_lens_k.shape)} and "
                f"{tuple(cu_seq_lens_q.shape)}"
            )
        return cu_seq_lens_q.to(torch.int32)
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != sq:
        return None
    if sq == sk and attention_mask is None:
        return packed_cu_seqlens(position_ids, batch)
    check_no_restart(position_ids, attention_mask)
    return None


def _fold(rows: Tensor) -> Tensor:
    """(B, H, S, D) -> (1, H, B * S, D), a view where the memory is (B, S, H, D)."""
    batch, heads, tokens, width = rows.shape
    return rows.transpose(1, 2).reshape(1, batch * tokens, heads, width).transpose(1, 2)
