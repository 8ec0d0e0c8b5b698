"""Losses of next tokens with little memory: the head runs on slices, so that no long text's logits exist at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from longattn.wrappers import check_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["forget_lengths", "next_token_losses", "serving"]

MAX_LOGITS = 1 << 25  # numbers that the head forms at a time: 128 MiB in float32


@contextmanager
def serving(model: nn.Module) -> Iterator[None]:
    """The model in eval mode without gradients, and in the mode it was in afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def forget_lengths(model: nn.Module) -> None:
    """Give "dynamic" rope the frequencies of a fresh model, as if no text had been read.

    transformers keeps those of the longest text until one shorter than the original length comes, so that what a text
    scores would depend on the texts before it.
    """
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        if not hasattr(module, "original_max_seq_len") or "dynamic" not in str(types):
            continue
        prefixes = (
            [f"{name}_" for name, kind in types.items() if kind == "dynamic"] if isinstance(types, dict) else [""]
        )
        for prefix in prefixes:
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
            if isinstance(grown := getattr(module, f"{prefix}inv_freq", None), torch.Tensor):
                original = getattr(module, f"{prefix}original_inv_freq")
                module.register_buffer(f"{prefix}inv_freq", original.to(grown.device), persistent=False)


def next_token_losses(
    model: PreTrainedModel, ids: Tensor, keep: int | None = None, *, max_logits: int = MAX_LOGITS
) -> Tensor:
    """`-log p(ids[:, i] | ids[:, :i])` of the last `keep` tokens, in nats, of a causal language model.

    The whole text goes through the layers once; the model's own head, with whatever its family does to logits, then
    runs on as many positions at a time as make `max_logits` numbers. Serving patterns are used, whatever mode the model
    is in, and "dynamic" rope is that of these texts, whatever was read before.

    Args:
        model: transformers' causal language model.
        ids: int64 (B, S), without padding.
        keep: tokens at the end that are scored, 1 to S - 1; all but the first by default.
        max_logits: numbers that the head may form at a time.

    Returns:
        float32 (B, keep), on the CPU.

    Raises:
        TypeError: `model` is a wrapper around a model.
        ValueError: `keep` is out of range.

    Example:
        >>> next_token_losses(model, ids, 256).mean().exp()  # perplexity of the last 256 tokens
    """
    check_model("next_token_losses", model)
    batch, length = ids.shape
    keep = length - 1 if keep is None else keep
    if not 1 <= keep < length:
        raise ValueError(f"next_token_losses: keep must be 1 to {length - 1} of {length} tokens, got {keep}")
    ids = ids.to(model.device)
    targets = ids[:, -keep:]
    losses = []
    forget_lengths(model)
    with serving(model):
        for start, logits in _logits(model, ids, keep, max_logits):
            wanted = targets[:, start : start + logits.shape[1]]
            losses.append(cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none").cpu())
    return torch.cat(losses, dim=1)


def _logits(model: PreTrainedModel, ids: Tensor, keep: int, max_logits: int) -> Iterator[tuple[int, Tensor]]:
    """Logits (B, n, vocabulary) that predict the last `keep` tokens, slice by slice, and each slice's start."""
    backbone = model.base_model
    if backbone is model:  # a family that keeps its layers and its head in one module
        yield 0, model(input_ids=ids, use_cache=False, logits_to_keep=keep + 1, return_dict=True).logits[:, :-1]
        return
    kept: list[Any] = []
    hook = backbone.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        vocabulary = model(input_ids=ids, use_cache=False, logits_to_keep=1, return_dict=True).logits.shape[-1]
    finally:
        hook.remove()
    (outputs,) = kept
    hidden = outputs.last_hidden_state[:, -keep - 1 : -1]  # (B, keep, hidden)
    rows = max(1, max_logits // (ids.shape[0] * vocabulary))
    for start in range(0, keep, rows):
        sliced = copy.copy(outputs)
        sliced.last_hidden_state = hidden[:, start : start + rows]
        with _returning(backbone, sliced):
            yield start, model(input_ids=ids[:, :1], use_cache=False, return_dict=True).logits


@contextmanager
def _returning(module: nn.Module, output: object) -> Iterator[None]:
    """Have a module return `output` instead of running."""
    own = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
