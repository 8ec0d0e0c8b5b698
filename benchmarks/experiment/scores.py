"""What the experiment measures of a model: perplexity of the same last tokens, recall, and streaming."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from corpus import NUM_VALUES, Ids, recall_rows

from longattn.demo.text import Document
from longattn.evaluate import next_token_losses
from longattn.evaluate.losses import forget_lengths

TOKENS_AT_ONCE = 8192  # bounds the memory of a forward pass
SCORED_OF = 16
KEYS_ASKED = 8
DEPTHS = 4


def text_windows(documents: Sequence[Document], tokenizer: Any, *, length: int, count: int) -> torch.Tensor:
    """int64 (count, length): the ends of held-out texts; as many of a file as fit without overlap, longest files first.

    Raises:
        ValueError: the held-out files are too short for so many.
    """
    windows: list[torch.Tensor] = []
    encoded = [tokenizer(document.text, add_special_tokens=False)["input_ids"] for document in documents]
    pieces = [torch.tensor(ids) for ids in encoded if len(ids) >= length]
    for end in range(0, max((len(ids) for ids in pieces), default=0), length):
        windows += [ids[end : end + length] for ids in pieces if len(ids) >= end + length]
    if len(windows) < count:
        raise ValueError(f"text_windows: {count} windows of {length} tokens asked for, the files give {len(windows)}")
    return torch.stack(windows[:count])


def text_perplexity(model: Any, windows: torch.Tensor, context: int) -> float:
    """Perplexity a token of the windows' last tokens, with `context` tokens in sight, a begin first.

    A sixteenth of a window is scored: half of the base's length, where windows are eight times that.
    """
    total = 0.0
    targets = windows.shape[1] // SCORED_OF
    for rows in _batches(_begun(model, windows, context)):
        total += next_token_losses(model, rows, targets).sum().item()
    return math.exp(total / (len(windows) * targets))


@torch.no_grad()
def recall(model: Any, stream: torch.Tensor, ids: Ids, *, length: int, rows: int, seed: int = 0) -> dict[str, Any]:
    """The share of keys whose value is the likeliest of all tokens, over all and by where in the row it was given.

    `by_depth` goes from the row's first quarter, farthest from the question, to its last.
    """
    draw = torch.Generator().manual_seed(seed)
    batch, places = recall_rows(stream, ids, rows=rows, length=length, keys=KEYS_ASKED, draw=draw)
    model.eval()
    right = []
    for part in _batches(batch):
        forget_lengths(model)
        logits = model(input_ids=part, use_cache=False, logits_to_keep=2 * KEYS_ASKED).logits  # (n, 2 * keys, V)
        right.append(logits[:, ::2].argmax(-1) == part[:, -2 * KEYS_ASKED + 1 :: 2])
    correct = torch.cat(right).float()  # (rows, keys)
    depth = (places * DEPTHS // (length - 2 * KEYS_ASKED)).clamp(max=DEPTHS - 1)
    by_depth = [correct[depth == quarter] for quarter in range(DEPTHS)]
    return {
        "accuracy": round(correct.mean().item(), 4),
        "by_depth": [round(part.mean().item(), 4) if len(part) else None for part in by_depth],
        "asked": correct.numel(),
        "chance": 1 / NUM_VALUES,
    }


def streamed_perplexity(model: Any, windows: torch.Tensor, edges: Sequence[int]) -> dict[str, float]:
    """Perplexity a token of long texts read from their begin, for the tokens between each two of the edges."""
    rows = _begun(model, windows, windows.shape[1])
    losses = [next_token_losses(model, part) for part in _batches(rows)]
    each = torch.cat(losses).double()  # (rows, tokens - 1), of which the first is that of position 1
    return {
        f"{start}-{end}": math.exp(each[:, max(start - 1, 0) : end - 1].mean().item())
        for start, end in zip(edges, edges[1:], strict=False)
    }


@torch.no_grad()
def attention_on_first(model: Any, windows: torch.Tensor, context: int) -> list[list[float]]:
    """The share of attention that the second half of the last `context` tokens pays the row's first, layer by head."""
    model.set_attn_implementation("eager")
    rows = _begun(model, windows, context)
    paid = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads)
    for part in _batches(rows):
        layers = model(input_ids=part, use_cache=False, output_attentions=True).attentions  # each (n, H, S, S)
        paid += torch.stack([layer[:, :, context // 2 :, 0].mean(2).sum(0) for layer in layers])
    return [[round(share, 4) for share in layer] for layer in (paid / len(rows)).tolist()]


def _begun(model: Any, windows: torch.Tensor, context: int) -> torch.Tensor:
    rows = windows[:, -context:].clone()
    rows[:, 0] = model.config.bos_token_id
    return rows


def _batches(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return rows.split(max(1, TOKENS_AT_ONCE // rows.shape[1]))
