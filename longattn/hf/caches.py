"""What a layer's cache holds: the keys that later queries of its pattern see; changes with transformers' caches.

Keys keep the rotation of their absolute position, so a key that is dropped changes nothing for those that stay.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer, StaticSlidingWindowLayer

from longattn.hf.families import serving_patterns
from longattn.hf.record import IMPLEMENTATION
from longattn.pattern import Pattern

__all__ = ["BandLayer", "band_layer_of", "held_of", "register_caches"]

# Keys beyond the needed ones that a layer may hold before it moves the needed ones to a tensor of their own.
SMALLEST_SLACK = 16
# A stock static sliding layer rolls its slots, which takes two of them.
SMALLEST_STATIC_WINDOW = 2


class BandLayer(DynamicLayer):
    """The cache of one layer that sees a window, with or without sinks, or groups without sinks.

    A window's layer holds its `n` sinks and then at least the last `W - 1` tokens; with `n` keys in front of those the
    same window and sinks show the same keys as if none between had been dropped. Groups drop whole groups, so that what
    stays is grouped as before. A row that begins with padding has its sinks right before the last tokens, or in them.

    Tokens are dropped once they have been attended to: `update` returns all keys, and attention calls `attended`.

    Args:
        pattern: what the layer sees when the model serves.
    """

    keys: Tensor  # (B, Hkv, held, D) once it is initialized
    values: Tensor
    is_sliding = True  # transformers then leaves it where it is when it offloads the layers that grow

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern
        self.cumulative_length = 0
        self.record_past = False
        self.starts: Tensor | None = None  # (B,) of the last forward
        self.knows_starts = False

    def activate_past_recording(self) -> None:
        """Drop nothing but in `crop`, which takes back the last tokens (assisted decoding)."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, Hkv, Sq, D); returns all that are held and the new ones, (B, Hkv, Sk, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.cumulative_length == 0:
            self.keys, self.values = key_states, value_states
        else:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        self.cumulative_length += key_states.shape[-2]
        # attention finds this layer by the tensor that it is given: a view, since the layer's own would be a cycle
        shown = self.keys.view_as(self.keys)
        shown.longattn_layer = self  # type: ignore[attr-defined]
        return shown, self.values

    def load(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        """Hold keys and values (B, Hkv, held, D) of a text's tokens so far: those that `held_of` names, in order."""
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.cumulative_length = keys, values, tokens

    def first_real_keys(self, starts: Tensor) -> Tensor:
        """Where each row's real keys begin among those that are held: int32 (B,).

        Args:
            starts: int32 (B,), tokens of padding that each row began with.
        """
        held = self.keys.shape[-2]
        dropped = self.cumulative_length - held
        if not dropped:
            return starts
        if self.pattern.kind == "group":
            inside = (starts - dropped) % self.pattern.size  # in a row that lost keys, where its next group begins
            return torch.where(starts >= dropped, starts - dropped, inside)
        sinks = self.pattern.sinks
        sinks_before = (dropped + sinks - starts).clamp(0, sinks)
        return sinks - sinks_before + (starts - dropped - sinks).clamp(min=0)

    def serves(self, pattern: Pattern) -> bool:
        """Whether these are the keys that `pattern` sees."""
        mine = self.pattern  # compared field by field, since a compiler may not know the sizes as constants
        return mine.kind == pattern.kind and mine.size == pattern.size and mine.sinks == pattern.sinks

    @property
    def has_dropped(self) -> bool:
        """Whether some of the tokens so far are not held any more."""
        return self.is_initialized and self.cumulative_length > self.keys.shape[-2]

    def attended(self, starts: Tensor | None) -> None:
        """Drop what no later query sees.

        Args:
            starts: int32 (B,), tokens of padding that each row began with; None where there is none.
        """
        self.starts, self.knows_starts = starts, True
        if not self.record_past:
            self._drop()

    def _drop(self) -> None:
        if not self.knows_starts:
            return
        held = self.keys.shape[-2]
        if self.pattern.kind == "group":
            size = self.pattern.size
            needed = (size - 1) * (1 if self.starts is None else 2)  # rows that are padded lose a part of a group more
            drop = (held - needed) // size * size
            if drop > 0:
                self.keys, self.values = (t[:, :, drop:].clone() for t in (self.keys, self.values))
            return
        sinks, last = self.pattern.sinks, self.pattern.size - 1
        if held - sinks - last < max(SMALLEST_SLACK, last // 8):
            return
        places = None if self.starts is None else self._places_of_sinks(self.starts.to(self.keys.device), last)
        self.keys, self.values = (_kept(t, sinks, places, last) for t in (self.keys, self.values))

    def _places_of_sinks(self, starts: Tensor, last: int) -> Tensor:
        """Which held keys go to the slots of the sinks when `last` tokens stay beside them: int64 (B, n)."""
        held, sinks, starts = self.keys.shape[-2], self.pattern.sinks, starts.long()[:, None]
        dropped = self.cumulative_length - held
        before = (dropped + sinks - starts).clamp(0, sinks)  # (B, 1) sinks that sit in slots already
        after = (self.cumulative_length - last - starts).clamp(0, sinks)
        number = torch.arange(sinks, device=starts.device) - (sinks - after)  # (B, n) which sink comes to this slot
        in_slot = sinks - before + number
        among_last = starts + number - dropped
        return torch.where(number < before, in_slot, among_last).clamp(0, held - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens so far and the new ones, from the first: masks are of the text, not of what is held."""
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, and drop what no later query sees."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: tokens_to_remove must not be positive, got {tokens_to_remove}")
        if not self.is_initialized:
            return
        left = self.keys.shape[-2] + tokens_to_remove
        if self.has_dropped and left < self.pattern.sinks + self.pattern.size - 1:
            raise RuntimeError(
                f"crop: {-tokens_to_remove} tokens can't be taken back: those before them, which would be seen again, "
                "were dropped; call activate_past_recording before these tokens are given"
            )
        super().crop(tokens_to_remove)
        self.cumulative_length += tokens_to_remove
        self._drop()

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.starts, self.knows_starts = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows; what is dropped waits for the next forward, which says where they begin."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.knows_starts = False

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the rows."""
        super().batch_repeat_interleave(repeats)
        self.knows_starts = False

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self.knows_starts = False


class StaticWindowLayer(StaticSlidingWindowLayer):
    """A ring of the last tokens whose mask is that of the text, since other layers of its cache hold more of it.

    Args:
        max_cache_len: tokens that the text may have.
        sliding_window: tokens that the ring holds.
    """

    def __init__(self, max_cache_len: int, sliding_window: int) -> None:
        super().__init__(max_cache_len, sliding_window)
        self.max_text_len = max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens that the text may have, from the first."""
        return self.max_text_len, 0


def _kept(held: Tensor, sinks: int, places: Tensor | None, last: int) -> Tensor:
    """The sinks and the last tokens of (B, Hkv, S, D), in memory of their own."""
    if places is None:
        first = held[:, :, :sinks]
    else:
        index = places[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
        first = held.gather(2, index)
    return torch.cat([first, held[:, :, held.shape[2] - last :]], dim=2)


def held_of(pattern: Pattern, tokens: int) -> list[tuple[int, int]]:
    """Ranges `start, stop` of a text's tokens whose keys a layer has to hold, in order."""
    held = pattern.cached_tokens(tokens)
    sinks = min(pattern.sinks, held) if held < tokens else 0
    return [(a, b) for a, b in ((0, sinks), (tokens - held + sinks, tokens)) if a < b]


def band_layer_of(keys: Tensor) -> BandLayer | None:
    """The layer that returned these keys; None for other caches, and where there is none."""
    return getattr(keys, "longattn_layer", None)


def register_caches() -> None:
    """Have the caches that transformers forms for a changed model hold what its patterns see, and no more.

    Models and `generate` form a `DynamicCache` or a `StaticCache` from the config, whose fields can say neither sinks
    nor a window of each layer's own. Caches of other attention implementations, and those that are given tensors, stay
    as they are.
    """
    for cache, layer_of in ((DynamicCache, _growing_layer), (StaticCache, _static_layer)):
        _replace_layers(cache, layer_of)


def _replace_layers(cache: Any, layer_of: Any) -> None:
    stock = cache.__init__
    if getattr(stock, "asks_longattn", False):
        return

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        config = kwargs.get("config", next((a for a in args if isinstance(a, PreTrainedConfig)), None))
        if config is None or type(self) is not cache:
            return
        config = config.get_text_config(decoder=True)
        if config._attn_implementation != IMPLEMENTATION:
            return
        if not any(getattr(layer, "is_initialized", False) for layer in self.layers):  # those of states don't say
            length = kwargs.get("max_cache_len", next((a for a in args if isinstance(a, int)), None))
            self.layers = [layer_of(pattern, length) for pattern in serving_patterns(config, "longattn")]

    init.asks_longattn = True  # type: ignore[attr-defined]
    cache.__init__ = init


def _growing_layer(pattern: Pattern, length: int | None) -> CacheLayerMixin:
    keeps_all = pattern.kind == "full" or (pattern.kind == "group" and pattern.sinks)
    return DynamicLayer() if keeps_all else BandLayer(pattern)


def _static_layer(pattern: Pattern, length: int) -> CacheLayerMixin:
    """Static layers have all their memory from the start; only a plain window can be a ring."""
    if pattern.kind == "window" and not pattern.sinks:
        return StaticWindowLayer(length, max(pattern.size, SMALLEST_STATIC_WINDOW))
    return StaticLayer(length)
