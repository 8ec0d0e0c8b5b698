"""Which pieces of texts are scored: the same characters for every context and every tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longattn.text import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ScoringWindow", "encode", "first_token", "leading_tokens", "scoring_windows", "spread_ends", "windows_at"]

SAMPLE_CHARS = 20_000  # of a text, whose tokens tell how many characters a token has


@dataclass(frozen=True)
class ScoringWindow:
    """A piece of a text: `ids`, of which the last `num_targets` are scored and spell `num_bytes` bytes.

    Args:
        name: the text's.
        ids: the tokens, the longest context's worth, less `first`.
        num_targets: how many of the last are scored.
        num_bytes: bytes that those spell.
        first: the token that the tokenizer puts before every text, which takes the first place of every context.
    """

    name: str
    ids: tuple[int, ...]
    num_targets: int
    num_bytes: int
    first: int | None = None

    def tail(self, context: int) -> list[int]:
        """The last tokens, `context` of them, the first token included."""
        first = [] if self.first is None else [self.first]
        room = context - len(first)
        if not self.num_targets <= room <= len(self.ids):
            shortest, longest = self.num_targets + len(first), len(self.ids) + len(first)
            raise ValueError(
                f"scoring window: context must be {shortest} to {longest} tokens for a piece of {self.name!r} with "
                f"{self.num_targets} scored tokens, got {context}"
            )
        return [*first, *self.ids[len(self.ids) - room :]]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text, with nothing put before or after it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts before every text, or None."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return None
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bos if ids[0] == bos else None


def leading_tokens(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """The first `count` tokens of each text, fewer where it has no more."""
    return [_tokens_from(tokenizer, doc.text, count)[:count] for doc in documents]


def spread_ends(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    longest: int,
    target_chars: int,
) -> list[tuple[Document, int]]:
    """Choose where windows end: spread over the texts that have `longest` tokens, and over each of them.

    Args:
        documents: texts, taken in their order.
        tokenizer: tells how many characters have `longest` tokens.
        count: ends wanted; fewer where the texts are too few and too short for ends `target_chars` apart.
        longest: tokens before an end, at least.
        target_chars: characters before an end that are scored, by no other window too.

    Returns:
        Texts and the characters at which a window of each may end.
    """
    long = [(doc, first) for doc in documents if (first := _first_end(tokenizer, doc.text, longest)) is not None]
    if not long:
        return []
    each = -(-count // len(long))
    ends = []
    for doc, first in long:
        places = max(1, min(each, (len(doc.text) - first) // max(1, target_chars) + 1))
        step = (len(doc.text) - first) // max(1, places - 1)
        ends.append([(doc, len(doc.text) - step * place) for place in range(places)])
    rounds = [texts[place] for place in range(each) for texts in ends if place < len(texts)]
    return rounds[:count]


def windows_at(
    ends: Iterable[tuple[Document, int]], tokenizer: PreTrainedTokenizerBase, *, longest: int, target_chars: int
) -> Iterator[ScoringWindow | None]:
    """Cut the windows that end at these characters, one by one.

    Args:
        ends: texts, and the character at which a window of each ends.
        tokenizer: turns the text into ids.
        longest: tokens a window holds, the tokenizer's first token included.
        target_chars: characters at the window's end that are scored.

    Returns:
        A window for each end; None where the text before it has too few tokens.
    """
    first = first_token(tokenizer)
    room = longest - (first is not None)
    for doc, end in ends:
        cut = max(0, end - target_chars)
        targets = encode(tokenizer, doc.text[cut:end])
        before = _tokens_to(tokenizer, doc.text, cut, room - len(targets))
        if len(targets) >= room or len(before) + len(targets) < room:
            yield None
            continue
        ids = (*before[len(before) + len(targets) - room :], *targets)
        yield ScoringWindow(doc.name, ids, len(targets), len(doc.text[cut:end].encode()), first)


def scoring_windows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    longest: int,
    target_chars: int = 128,
    ends: Sequence[int] | None = None,
) -> list[ScoringWindow]:
    """Cut windows of `longest` tokens out of the texts; whatever the tokenizer, those of one end score the same text.

    Args:
        documents: texts that the model was not trained on, taken in their order.
        tokenizer: turns the text into ids.
        count: windows to return; fewer where the texts are too short for more.
        longest: tokens a window holds.
        target_chars: characters at the window's end that are scored.
        ends: the character at which a window may end; a text gives one for each end that it reaches, first all at the
            first end. By default they are spread over the texts, where tokenizers differ otherwise for each.

    Example:
        >>> texts = list(load_documents("books"))
        >>> windows = scoring_windows(texts, tokenizer, count=16, longest=32768, target_chars=1024)
    """
    if ends is None:
        places = spread_ends(documents, tokenizer, count=count, longest=longest, target_chars=target_chars)
    else:
        places = [(doc, end) for end in ends for doc in documents if len(doc.text) >= end]
    windows: list[ScoringWindow] = []
    for window in windows_at(places, tokenizer, longest=longest, target_chars=target_chars):
        if len(windows) == count:
            break
        if window is not None:
            windows.append(window)
    return windows


def _chars_per_token(tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    sample = text[:SAMPLE_CHARS]
    return max(1.0, len(sample) / max(1, len(encode(tokenizer, sample))))


def _tokens_to(tokenizer: PreTrainedTokenizerBase, text: str, end: int, count: int) -> list[int]:
    """At least `count` tokens of the text that ends at a character, or all: no more of a long text is encoded."""
    chars = int(max(1, count) * _chars_per_token(tokenizer, text) * 1.5) + 16
    while True:
        ids = encode(tokenizer, text[max(0, end - chars) : end])
        if len(ids) > count or chars >= end:
            return ids
        chars *= 2


def _tokens_from(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[int]:
    """At least `count` tokens from the start of the text, or all."""
    chars = int(max(1, count) * _chars_per_token(tokenizer, text) * 1.5) + 16
    while True:
        ids = encode(tokenizer, text[:chars])
        if len(ids) > count or chars >= len(text):
            return ids
        chars *= 2


def _first_end(tokenizer: PreTrainedTokenizerBase, text: str, longest: int) -> int | None:
    """About the first character that has `longest` tokens before it; None in a text that has fewer."""
    if len(text.encode()) < longest:  # no tokenizer makes more tokens than there are bytes
        return None
    chars = int(longest * _chars_per_token(tokenizer, text) * 1.05) + 16
    while chars < len(text):
        if len(encode(tokenizer, text[:chars])) >= longest:
            return chars
        chars = int(chars * 1.1) + 16
    return len(text) if len(encode(tokenizer, text)) >= longest else None
