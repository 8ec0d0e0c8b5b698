"""Perplexity of long texts, in the ways that are reported; each says which tokens it scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from longattn.evaluate.losses import next_token_losses
from longattn.evaluate.windows import ScoringWindow

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["Score", "SlidingScore", "score_last", "score_sliding", "token_loss"]

TOKENS_AT_ONCE = 8192  # bounds the memory of a forward pass

OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class Score:
    """What a model makes of some tokens: `nats` is the sum of `-log p` over `tokens`, which spell `num_bytes` bytes.

    Args:
        context: tokens that the model saw at most, the scored ones included.
        nats: a sum, NaN where the model's logits were.
        tokens: scored ones.
        num_bytes: of their text.
        windows: pieces of text.
    """

    context: int
    nats: float
    tokens: int
    num_bytes: int
    windows: int

    @property
    def perplexity(self) -> float:
        """Per token."""
        return _exp(self.nats / self.tokens)

    @property
    def byte_perplexity(self) -> float:
        """Per byte: comparable between tokenizers."""
        return _exp(self.nats / self.num_bytes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is not finite is None."""
        return _finite({**asdict(self), "perplexity": self.perplexity, "byte_perplexity": self.byte_perplexity})

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Score:
        """What `to_dict` gave."""
        return _read(cls, stored)


@dataclass(frozen=True)
class SlidingScore:
    """Sliding-window perplexity at one length, as two papers report it; both come from the same passes.

    Args:
        length: tokens of a window.
        stride: tokens from one window to the next.
        windows: how many there were.
        documents: the texts that they were cut from.
        longlora: per token, over all tokens of every window.
        yarn: per token, over all tokens of a text's first window and the last `stride` of its others.
    """

    length: int
    stride: int
    windows: int
    documents: int
    longlora: float
    yarn: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is not finite is None."""
        return _finite(asdict(self))

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> SlidingScore:
        """What `to_dict` gave."""
        return _read(cls, stored)


def score_last(
    model: PreTrainedModel,
    windows: Sequence[ScoringWindow],
    context: int,
    *,
    on_batch: OnBatch | None = None,
) -> Score:
    """Score the windows' ends, given that the model sees their last `context` tokens.

    The same tokens are scored at every context, so that what differs is what the model makes of the text before them:
    where perplexity falls, it uses more text; where it rises, more text harms.

    Args:
        model: transformers' causal language model.
        windows: what `scoring_windows` gives.
        context: tokens in sight, scored ones included.
        on_batch: called with the windows done after each pass.

    Raises:
        ValueError: no window, or one that `context` does not fit.

    Example:
        >>> score_last(model, windows, 32768).perplexity
    """
    if not windows:
        raise ValueError("score_last: windows must hold at least one, got none")
    kept = max(window.num_targets for window in windows)
    ids = torch.tensor([window.tail(context) for window in windows])  # (N, context)
    counts = torch.tensor([window.num_targets for window in windows])  # (N,)
    scored = torch.arange(kept, 0, -1) <= counts[:, None]  # (N, kept)
    total = 0.0
    for rows, mask in _batches(context, ids, scored):
        total += next_token_losses(model, rows, kept)[mask].double().sum().item()
        if on_batch:
            on_batch(len(rows))
    return Score(context, total, int(counts.sum()), sum(window.num_bytes for window in windows), len(windows))


def score_sliding(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    length: int,
    *,
    stride: int = 256,
    max_windows: int | None = None,
    first: int | None = None,
    on_batch: OnBatch | None = None,
) -> SlidingScore:
    """Slide windows of `length` tokens over texts and score them as LongLoRA and as YaRN report it.

    Both slide by 256 tokens. LongLoRA scores all tokens of every window, so that most of them have less than `length`
    tokens of context, and a text's middle counts many times. YaRN follows Press et al.: each token is scored once, all
    of a text's first window and the last `stride` of every other. Neither scores the same tokens at two lengths;
    `score_last` does. Unlike LongLoRA's script, texts are not run together and the last window is not dropped; means
    are over tokens, where YaRN's are over windows.

    Args:
        model: transformers' causal language model.
        texts: ids of each text; those shorter than a window are left out.
        length: tokens of a window, `first` included.
        stride: tokens from one window to the next.
        max_windows: of all texts, as evenly shared as their lengths allow; all by default.
        first: a token to put before every window.
        on_batch: called with the windows done after each pass.

    Raises:
        ValueError: no text has a window's tokens, or a number is out of range.

    Reference:
        Chen et al. 2023, "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", arXiv:2309.12307;
        Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models", arXiv:2309.00071;
        Press et al. 2021, "Train Short, Test Long", arXiv:2108.12409.

    Example:
        >>> score_sliding(model, leading_tokens(documents, tokenizer, 40960), 32768, max_windows=16).longlora
    """
    head = [] if first is None else [first]
    body = length - len(head)
    if not 1 <= stride < length:
        raise ValueError(f"score_sliding: stride must be 1 to {length - 1}, below length {length}, got {stride}")
    long = [list(ids) for ids in texts if len(ids) >= body]
    if not long or (max_windows is not None and max_windows < 1):
        longest = max((len(ids) + len(head) for ids in texts), default=0)
        raise ValueError(
            f"score_sliding: texts must hold one of {length} tokens, and max_windows be at least 1 or None, got "
            f"{longest} tokens in the longest text and max_windows {max_windows}"
        )
    starts = _starts([(len(ids) - body) // stride + 1 for ids in long], max_windows)
    windows = torch.tensor([head + long[text][at * stride : at * stride + body] for text, at in starts])  # (N, length)
    is_first = torch.tensor([at == 0 for _, at in starts])  # (N,)
    whole = last = 0.0
    scored = 0
    for rows, opening in _batches(length, windows, is_first):
        losses = next_token_losses(model, rows).double()  # (n, length - 1)
        once = opening[:, None] | (torch.arange(length - 1, 0, -1) <= stride)
        whole += losses.sum().item()
        last += losses[once].sum().item()
        scored += int(once.sum())
        if on_batch:
            on_batch(len(rows))
    longlora = _exp(whole / (len(starts) * (length - 1)))
    return SlidingScore(length, stride, len(starts), len({text for text, _ in starts}), longlora, _exp(last / scored))


def token_loss(
    model: PreTrainedModel, windows: Sequence[ScoringWindow], context: int, tokens: Collection[int]
) -> tuple[float, int]:
    """Mean of `-log p`, in nats, where the next token is one of `tokens`, and how many such places there are.

    Args:
        model: transformers' causal language model.
        windows: what `scoring_windows` gives; all their tokens count here.
        context: tokens of each window, from its end.
        tokens: ids.

    Raises:
        ValueError: none of the tokens occurs.

    Example:
        >>> loss, places = token_loss(model, windows, 1024, [tokenizer.convert_tokens_to_ids("<tool>")])
    """
    ids = torch.tensor([window.tail(context) for window in windows])  # (N, context)
    wanted = torch.isin(ids[:, 1:], torch.tensor(sorted(tokens)))
    count = int(wanted.sum())
    if not count:
        raise ValueError(f"token_loss: tokens {sorted(tokens)} never occur in the last {context} tokens of the windows")
    total = 0.0
    for rows, mask in _batches(context, ids, wanted):
        total += next_token_losses(model, rows)[mask].double().sum().item()
    return total / count, count


def _starts(counts: Sequence[int], most: int | None) -> list[tuple[int, int]]:
    """Which windows of which texts: the first of every text, then the second, until there are `most`; in text order."""
    turns = [(turn, text) for text, count in enumerate(counts) for turn in range(count)]
    return sorted((text, turn) for turn, text in sorted(turns)[:most])


def _batches(context: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    rows = max(1, TOKENS_AT_ONCE // context)
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def _read(cls: Any, stored: dict[str, Any]) -> Any:
    """A dataclass from its dict, whose other keys follow from these; what was not finite comes back as NaN."""
    return cls(**{field.name: _number(stored[field.name]) for field in fields(cls)})


def _number(value: Any) -> Any:
    return math.nan if value is None else value
