"""What the demo measures: perplexity of the same last bytes as the text before them grows, and of single tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from longattn.demo.text import Document

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ScoringWindow", "encode", "perplexity", "scoring_windows", "token_loss"]

TOKENS_AT_ONCE = 8192  # bounds the memory of a forward pass


@dataclass(frozen=True)
class ScoringWindow:
    """A piece of a held-out file: `ids`, of which the last `num_targets` are scored and spell `num_bytes` bytes."""

    name: str
    ids: tuple[int, ...]
    num_targets: int
    num_bytes: int


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text, with nothing put before or after it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def scoring_windows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    longest: int,
    target_chars: int = 128,
    ends: Sequence[int] = (4096, 8192, 12288),
) -> list[ScoringWindow]:
    """Cut windows of `longest` tokens out of the documents; whatever the tokenizer, they end at the same characters.

    Args:
        documents: held-out files, taken in their order, first all at the first end.
        tokenizer: turns the text into ids.
        count: windows to return; fewer where the files are too short for more.
        longest: tokens a window holds.
        target_chars: characters at the window's end that are scored.
        ends: the character at which a window may end; a file gives one window for each end that it reaches.
    """
    windows: list[ScoringWindow] = []
    for end in ends:
        for doc in documents:
            if len(windows) == count:
                return windows
            if len(doc.text) < end:
                continue
            target = doc.text[end - target_chars : end]
            targets = encode(tokenizer, target)
            # 8 characters a token are more than any tokenizer needs here, and bound the work in long files
            before = encode(tokenizer, doc.text[max(0, end - target_chars - 8 * longest) : end - target_chars])
            if len(before) + len(targets) < longest:
                continue
            ids = (*before[len(before) + len(targets) - longest :], *targets)
            windows.append(ScoringWindow(doc.name, ids, len(targets), len(target.encode())))
    return windows


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Sequence[ScoringWindow], context: int) -> float:
    """Perplexity per byte of the windows' scored ends, given that the model sees their last `context` tokens.

    `exp(-sum(log p(target)) / bytes)`: where a token is a byte it is the perplexity per token, and it stays
    comparable where the tokenizer got new tokens.
    """
    kept = max(window.num_targets for window in windows)
    ids = torch.tensor([window.ids[-context:] for window in windows])  # (N, context)
    counts = torch.tensor([window.num_targets for window in windows])  # (N,)
    scored = torch.arange(kept, 0, -1) <= counts[:, None]  # (N, kept)
    total = 0.0
    model.eval()
    for rows, mask in _batches(context, ids, scored):
        logits = model(input_ids=rows, use_cache=False, logits_to_keep=kept + 1).logits[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), rows[:, -kept:], reduction="none")  # (n, kept)
        total += losses[mask].double().sum().item()
    return math.exp(total / sum(window.num_bytes for window in windows))


@torch.no_grad()
def token_loss(
    model: PreTrainedModel, windows: Sequence[ScoringWindow], context: int, tokens: Collection[int]
) -> tuple[float, int]:
    """Mean of `-log p`, in nats, where the next token is one of `tokens`, and how many such places there are."""
    ids = torch.tensor([window.ids[-context:] for window in windows])  # (N, context)
    wanted = torch.isin(ids[:, 1:], torch.tensor(sorted(tokens)))
    count = int(wanted.sum())
    if not count:
        raise ValueError(f"token_loss: tokens {sorted(tokens)} never occur in the last {context} tokens of the windows")
    total = 0.0
    model.eval()
    for rows, mask in _batches(context, ids, wanted):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")  # (n, context - 1)
        total += losses[mask].double().sum().item()
    return total / count, count


def _batches(context: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    rows = max(1, TOKENS_AT_ONCE // context)
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
