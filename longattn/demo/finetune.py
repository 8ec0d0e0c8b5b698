"""The demo's short fine-tune: a few steps of AdamW on the trained half of the text, at the new length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from longattn.evaluate.windows import encode
from longattn.text import Document

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["fine_tune", "token_stream"]

WARMUP_STEPS = 5
MAX_GRADIENT_NORM = 1.0


def token_stream(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, max_chars: int, max_chars_of_one: int = 65536
) -> Tensor:
    """Ids of the documents in their order, an end-of-text after each, until `max_chars` characters are in.

    No document gives more than `max_chars_of_one`, so that one long file is not most of the text.

    Returns:
        int64 (N,).
    """
    ids: list[int] = []
    chars = 0
    for doc in documents:
        if chars >= max_chars:
            break
        text = doc.text[:max_chars_of_one]
        chars += len(text)
        ids += [*encode(tokenizer, text), tokenizer.eos_token_id]
    return torch.tensor(ids)


def fine_tune(
    model: PreTrainedModel,
    stream: Tensor,
    *,
    context: int,
    steps: int,
    batch: int,
    learning_rate: float = 5e-4,
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
) -> list[float]:
    """Train in place on random windows of `stream`, warmed up, then cosine-decayed to a tenth.

    Args:
        model: trained in place, left in eval mode.
        stream: int64 (N,), token ids.
        context: tokens of a window.
        steps: optimizer steps.
        batch: windows a step.
        learning_rate: its peak.
        seed: of the windows drawn; the same for every model that is to be compared.
        on_step: called after each step.

    Returns:
        The loss of each step, in nats a token.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    model.train()
    for step in range(steps):
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        starts = torch.randint(0, len(stream) - context, (batch,), generator=draw).tolist()
        ids = torch.stack([stream[start : start + context] for start in starts])  # (batch, context)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        losses.append(loss.item())
        if on_step:
            on_step()
    model.eval()
    return losses
