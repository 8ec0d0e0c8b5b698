"""The language of attention patterns: `full`, `window:W`, `group:G+shift`, `+sinks:n`, and which layer has which.

One text form serves plans, flags, YAML and reports: `parse_pattern` reads it, `str(pattern)` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from longattn.rope_keys import nearest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pattern", "parse_pattern", "parse_patterns"]

KINDS = ("full", "window", "group")
GRAMMAR = "full, window:W, group:G, group:G+shift or group:G+shift:S, with +sinks:n after any but full"
MAX_TOKENS = 10**15  # no text is longer, and no sum of two such numbers overflows
_TERM = re.compile(r"(?:([0-9]+)\s*[x*]\s*)?([^,]+)")


@dataclass(frozen=True)
class Pattern:
    """Which keys a query of one layer sees.

    Args:
        kind: "full" (causal), "window" or "group".
        size: tokens a window or a group holds; a window's size includes the query's own key.
        shift: tokens by which the groups of the second half of the heads are shifted, `0 <= shift < size`.
        sinks: how many first keys stay visible beside the window or the group.
    """

    kind: Literal["full", "window", "group"]
    size: int = 0
    shift: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Pattern: kind must be 'full', 'window' or 'group', got {self.kind!r}")
        for name in ("size", "shift", "sinks"):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise ValueError(f"Pattern: {name} must be an int >= 0, got {number!r}")
            if number > MAX_TOKENS:
                raise ValueError(f"Pattern: {name} must be at most 10^15, got one of {len(str(number))} digits")
        if self.kind == "full" and (self.size or self.shift or self.sinks):
            raise ValueError(
                f"Pattern: 'full' takes no size, shift or sinks, got {self.size}, {self.shift}, {self.sinks}"
            )
        if self.kind != "full" and self.size < 1:
            raise ValueError(f"Pattern: a {self.kind} must hold at least 1 token, got {self.size}")
        if self.shift and self.kind != "group":
            raise ValueError(f"Pattern: only a group can be shifted, got shift {self.shift} on a {self.kind}")
        if self.kind == "group" and self.shift >= self.size:
            raise ValueError(f"Pattern: shift must be below the group's {self.size} tokens, got {self.shift}")

    def __str__(self) -> str:
        if self.kind == "full":
            return "full"
        text = f"{self.kind}:{self.size}"
        if self.shift:
            text += "+shift" if self.shift == self.size // 2 else f"+shift:{self.shift}"
        return text + (f"+sinks:{self.sinks}" if self.sinks else "")

    def sees_beyond(self, num_tokens: int) -> bool:
        """Whether, in a text long enough, a query sees keys that a window of `num_tokens` does not show it."""
        return self.kind == "full" or self.sinks > 0 or self.size > num_tokens

    def visible(self, num_tokens: int) -> float:
        """Count the (query, key) pairs that a text of `num_tokens` makes visible, averaged over the heads."""
        half = _visible(self, num_tokens, 0)
        return half if not self.shift else (half + _visible(self, num_tokens, self.shift)) / 2

    def cached_tokens(self, num_tokens: int) -> int:
        """Tokens of `num_tokens` whose keys a cache has to hold for the queries to come.

        A window needs the W - 1 before the next query, and its sinks. A cache drops whole groups; of groups that are
        shifted in half of the heads it holds those that either half needs, at most 2 G - 2 tokens; with sinks all.
        """
        if self.kind == "window":
            return min(num_tokens, self.size - 1 + self.sinks)
        if self.kind == "group" and not self.sinks:
            return num_tokens - max(num_tokens - (self.size - 1), 0) // self.size * self.size
        return num_tokens

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        sink_logits: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        kv_start: Tensor | None = None,
        kv_end: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of this pattern; arguments and result as `longattn.window_attention`'s."""
        from longattn.ops.group_attention import group_attention
        from longattn.ops.window_attention import window_attention

        shared: dict[str, Any] = dict(scale=scale, softcap=softcap, sink_tokens=self.sinks, sink_logits=sink_logits)
        shared |= dict(cu_seqlens=cu_seqlens, kv_start=kv_start, kv_end=kv_end)
        if self.kind == "group":
            return group_attention(query, key, value, self.size, shift=self.shift, **shared)
        return window_attention(query, key, value, (-1, 0) if self.kind == "full" else self.size, **shared)


def _visible(pattern: Pattern, num_tokens: int, shift: int) -> int:
    """Visible pairs of one head whose groups are shifted by `shift`."""
    n, size, sinks = num_tokens, pattern.size, pattern.sinks
    if pattern.kind == "full":
        return n * (n + 1) // 2
    if pattern.kind == "window":
        # query p sees min(p + 1, size) keys of the band, and of the p + 1 - size keys before it at most the sinks
        near = min(n, size)
        seen = near * (near + 1) // 2 + (n - near) * size
        return seen + _triangle(n - near, sinks)
    borders = [0, *range(size - shift, n, size), n] if shift else [*range(0, n, size), n]
    lengths = [(start, end - start) for start, end in zip(borders, borders[1:], strict=False)]
    return sum(length * (length + 1) // 2 + length * min(start, sinks) for start, length in lengths)


def _triangle(count: int, cap: int) -> int:
    """Sum of min(t, cap) over t = 1 .. count."""
    low = min(count, cap)
    return low * (low + 1) // 2 + (count - low) * cap


def parse_pattern(text: str) -> Pattern:
    """Read one pattern.

    Args:
        text: full | window:W | group:G | group:G+shift (half a group) | group:G+shift:S; +sinks:n on any but full.

    Raises:
        ValueError: `text` is none of these.

    Example:
        >>> str(parse_pattern("group:2048+shift:1024+sinks:4"))
        'group:2048+shift+sinks:4'
    """
    if not isinstance(text, str):
        raise TypeError(f"pattern must be a str ({GRAMMAR}), got {type(text).__name__}")
    head, *options = [part.strip() for part in text.strip().split("+")]
    kind, _, size = (part.strip() for part in head.partition(":"))
    if kind == "full" and not size and not options:
        return Pattern("full")
    if kind not in ("window", "group") or not size:
        hint = "" if kind in KINDS else nearest(kind.lower(), KINDS)
        raise ValueError(f"pattern must be {GRAMMAR}, got {text!r}{hint}")
    tokens = _number(size, text)
    shift = sinks = None
    for option in options:
        name, colon, number = (part.strip() for part in option.partition(":"))
        if name == "shift" and kind == "group" and shift is None:
            shift = _number(number, text) if colon else tokens // 2
        elif name == "sinks" and colon and sinks is None:
            sinks = _number(number, text)
        else:
            raise ValueError(f"pattern must be {GRAMMAR}, got {text!r}: {option!r} does not fit there")
    try:
        return Pattern("window" if kind == "window" else "group", tokens, shift or 0, sinks or 0)
    except ValueError as error:
        raise ValueError(f"pattern {text!r}: {str(error).removeprefix('Pattern: ')}") from None


def _number(text: str, pattern: str) -> int:
    if not re.fullmatch(r"[0-9]+", text):
        raise ValueError(f"pattern {pattern!r}: expected a whole number >= 0, got {text!r}")
    if len(text.lstrip("0")) > 16:
        raise ValueError(f"pattern {pattern[:40]!r}: expected a number of at most 10^15, got one of {len(text)} digits")
    return int(text)


def parse_patterns(patterns: str | Sequence[str], num_layers: int) -> list[Pattern]:
    """Give every layer its pattern.

    Args:
        patterns: a text such as "3 x window:4096+sinks:4, 1 x full", cycled over the layers, or a list, one a layer.
        num_layers: how many layers the model has.

    Returns:
        `num_layers` patterns.

    Raises:
        ValueError: a term can't be read, a count is 0, or a list has another length than the model has layers.

    Example:
        >>> [str(p) for p in parse_patterns("2 x window:8, full", 4)]
        ['window:8', 'window:8', 'full', 'window:8']
    """
    if not isinstance(patterns, str):
        layers = [p if isinstance(p, Pattern) else parse_pattern(p) for p in patterns]
        if len(layers) != num_layers:
            raise ValueError(f"attention must list one pattern a layer, {num_layers} in all, got {len(layers)}")
        return layers
    cycle: list[Pattern] = []
    for term in patterns.split(","):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise ValueError(
                f"attention must be patterns separated by commas, each with an optional count, got {patterns!r}"
            )
        count = 1 if match[1] is None else _number(match[1], term.strip())
        if count < 1:
            raise ValueError(f"attention: a count must be at least 1, got {term.strip()!r}")
        cycle += [parse_pattern(match[2])] * min(count, num_layers)  # nothing after the last layer is ever reached
    return [cycle[layer % len(cycle)] for layer in range(num_layers)]
