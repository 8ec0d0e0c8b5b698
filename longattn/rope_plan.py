"""What a plan's rope and context make of a config's rope parameters; changes with the meaning of a plan."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from longattn.rope import rope_frequencies, stock_parameters
from longattn.rope_check import ORIGINAL, check_keys_fit, check_length, check_rope
from longattn.rope_keys import REQUIRED_KEYS, SCALING_KEYS, RopeValues, flat_parameters, is_nested, rope_keys

__all__ = ["RopeChange", "resolve_rope"]

# What each type is saved as, where that is another one.
SAVED_AS = {"ntk": "default", "by-parts": "yarn"}
FULL = "full_attention"
LLAMA3_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class RopeChange:
    """A config's new rotary parameters and length.

    Args:
        rope_parameters: transformers' dict, flat or one per layer type, of stock types only.
        max_position_embeddings: the new length in tokens; unchanged where the type is "dynamic".
    """

    rope_parameters: dict[str, Any]
    max_position_embeddings: int


def resolve_rope(
    current: Mapping[str, Any],
    max_position_embeddings: int,
    rope: Mapping[str, Any] | None,
    context: int | None,
    head_dim: int,
    *,
    length_only: bool = False,
) -> RopeChange:
    """Merge a plan's rope and context into a config's rope parameters.

    The new length is the old one times the factor, `context` where that is given; "dynamic" keeps the old one.

    Args:
        current: the config's `rope_parameters` (v4's `rope_scaling` beside `rope_theta` is read too), flat or nested.
        max_position_embeddings: the config's length in tokens.
        rope: the plan's part of that name; a flat one goes to `full_attention` where `current` is nested.
        context: the length asked for, in tokens.
        head_dim: channels of a head.
        length_only: whether `context` alone may raise the length and leave every frequency as it is, as it does for a
            model whose attention patterns bound the distances.

    Returns:
        The new parameters, of stock types only, and the new length.

    Raises:
        ValueError: the plan contradicts itself or the stored parameters, or changes no frequency; it makes a stored
            longrope longer without a new `long_factor`.

    Example:
        >>> old = {"rope_type": "default", "rope_theta": 10000.0}
        >>> new = resolve_rope(old, 4096, {"rope_type": "yarn", "factor": 4}, None, 64)
        >>> new.max_position_embeddings, new.rope_parameters["original_max_position_embeddings"]
        (16384, 4096)
    """
    check_length("extend: max_position_embeddings", max_position_embeddings)
    if context is not None:
        check_length("extend: context", context)
    plans = _plans_by_layer_type(current, None if rope is None else check_rope(rope))
    changes: dict[str | None, RopeChange] = {}
    for layer_type, plan in plans.items():
        stored = flat_parameters("extend", current if layer_type is None else current[layer_type])
        name = "extend: rope" if layer_type is None else f"extend: rope[{layer_type!r}]"
        one = _Merge(name, stored, max_position_embeddings, plan, context, head_dim)
        changes[layer_type] = one.change(length_only)
    if None in changes:
        return changes[None]
    length = _common_length(changes, current, max_position_embeddings, context)
    nested = {key: copy.deepcopy(dict(value)) if value else value for key, value in current.items()}
    nested.update({str(layer_type): change.rope_parameters for layer_type, change in changes.items()})
    _check_side_effects(nested, changes, head_dim, max_position_embeddings, length)
    return RopeChange(nested, length)


def _plans_by_layer_type(current: Mapping[str, Any], rope: dict[str, Any] | None) -> dict[str | None, dict[str, Any]]:
    """Which layer types a plan changes, and its part for each; None names a flat config's only one."""
    rope = rope or {}
    if not is_nested(current):
        if is_nested(rope):
            raise ValueError(
                f"extend: rope names the layer types {list(rope)}, but the model has one rope for all layers"
            )
        return {None: rope}
    layer_types = [key for key, value in current.items() if isinstance(value, Mapping)]
    if not is_nested(rope):
        rope = {FULL: rope}
    for layer_type in rope:
        if layer_type not in layer_types:
            raise ValueError(
                f"extend: rope names the layer type {layer_type!r}, the model's with rope are {layer_types}"
            )
    return rope  # type: ignore[return-value]


def _common_length(
    changes: Mapping[str | None, RopeChange], current: Mapping[str, Any], length: int, context: int | None
) -> int:
    """The layers that see everything decide; where there are none, all that the plan names must agree."""
    lengths = {layer_type: change.max_position_embeddings for layer_type, change in changes.items()}
    if FULL in lengths:
        return lengths[FULL]
    if isinstance(current.get(FULL), Mapping):
        if context is not None:
            raise ValueError(
                f"extend: context is the length of the layers that see everything, so that rope must name '{FULL}' "
                f"too, got rope for {list(lengths)}"
            )
        return length
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"extend: rope gives the layer types different lengths {lengths}; give the same factors or context"
        )
    return next(iter(lengths.values()))


def _check_side_effects(
    nested: Mapping[str, Any], changes: Mapping[str | None, RopeChange], head_dim: int, before: int, after: int
) -> None:
    """Some types read the model's length, which is one for all layer types, so that another type's plan moves them."""
    for layer_type, parameters in nested.items():
        if not isinstance(parameters, Mapping):
            continue
        meant = changes[layer_type].max_position_embeddings if layer_type in changes else before
        if not _same_frequencies(parameters, meant, parameters, after, head_dim, 2 * max(meant, after)):
            raise ValueError(
                f"extend: rope[{layer_type!r}] of type '{parameters.get('rope_type')}' depends on "
                f"max_position_embeddings, which is one for all layer types: it would be {after} where {meant} is meant"
            )


@dataclass(frozen=True)
class _Merge:
    """One layer type's stored parameters and what a plan asks of them."""

    name: str
    stored: dict[str, Any]
    length: int
    plan: dict[str, Any]
    context: int | None
    head_dim: int

    @property
    def rope_type(self) -> str:
        return self.plan.get("rope_type", self.stored["rope_type"])

    @property
    def keeps_type(self) -> bool:
        return SAVED_AS.get(self.rope_type, self.rope_type) == self.stored["rope_type"]

    def change(self, length_only: bool) -> RopeChange:
        self._check_type()
        check_keys_fit(self.plan, self.rope_type, self.name)
        start, stored_factor = self._start()
        ratio = self._ratio(start)
        length = round(start * ratio)
        self._check_longrope(start * ratio)
        parameters = self._merged(start, stored_factor * ratio, length)
        parameters = stock_parameters(parameters, self.head_dim)
        if self.rope_type == "dynamic":
            length = self.plan.get(ORIGINAL, self.length)  # the formula starts from the length that was trained
        change = RopeChange(parameters, length)
        if not (length_only and not self.plan and length != self.length):
            self._check_frequencies(change, 2 * max(round(start * ratio), self.length))
        return change

    def _check_type(self) -> None:
        scaled = self.stored["rope_type"] != "default"
        if scaled and not self.keeps_type and ORIGINAL not in self.plan:
            raise ValueError(
                f"{self.name}: the checkpoint is scaled already, {self.stored}; rope_type '{self.rope_type}' can "
                f"only take its place if the plan gives {ORIGINAL}, the length that it counts from"
            )

    def _start(self) -> tuple[float, float]:
        """The tokens that the plan's factor multiplies, and the stored factor that it multiplies too."""
        if ORIGINAL in self.plan:
            return self.plan[ORIGINAL], 1.0
        stored = self.stored
        original = stored.get(ORIGINAL, self.length)
        if not self.keeps_type or stored["rope_type"] == "default":
            return self.length, 1.0
        factor = RopeValues(self.name, stored).number("factor", self.length / original, at_least=1.0)
        # These two keep the unscaled length in the config: "dynamic" always, "yarn" where it was only turned on.
        unscaled = stored["rope_type"] == "dynamic" or (stored["rope_type"] == "yarn" and original == self.length)
        return (self.length * factor if unscaled else self.length), factor

    def _ratio(self, start: float) -> float:
        """How many times longer than `start` the new context is."""
        takes_factor = "factor" in rope_keys(self.rope_type)
        factor = self.plan.get("factor")
        if self.context is not None and self.context < start:
            raise ValueError(f"{self.name}: context must be at least the present {start:g} tokens, got {self.context}")
        if factor is not None:
            if self.context is not None and abs(start * factor - self.context) >= 1:
                raise ValueError(
                    f"{self.name}: factor {factor:g} times {start:g} tokens is {start * factor:g}, but context is "
                    f"{self.context}; give one of the two"
                )
            return float(factor) if self.context is None else self.context / start
        if self.context is not None:
            return self.context / start
        if not takes_factor or "rope_theta" in self.plan:
            raise ValueError(
                f"{self.name}: rope_type '{self.rope_type}' without a factor needs context, the new length"
            )
        if not self.keeps_type or ORIGINAL in self.plan or self.stored["rope_type"] == "default":
            raise ValueError(f"{self.name}: rope_type '{self.rope_type}' needs a factor, or context to compute it from")
        return 1.0

    def _check_longrope(self, length: float) -> None:
        """Longrope's frequencies are stored lists, which no factor moves: it sets the sharpening of attention alone."""
        scaled = self.rope_type == self.stored["rope_type"] == "longrope"
        if scaled and length > self.length and "long_factor" not in self.plan:
            raise ValueError(
                f"{self.name}: the checkpoint's long_factor serves {self.length} tokens, and no factor or context "
                f"changes it; for {round(length)} tokens the plan must give a new long_factor, got "
                f"{self.plan or 'context alone'}"
            )

    def _merged(self, start: float, factor: float, length: int) -> dict[str, Any]:
        own = rope_keys(self.rope_type)
        kept = {key: value for key, value in self.stored.items() if self.keeps_type or key not in SCALING_KEYS}
        parameters = {**kept, **self.plan, "rope_type": self.rope_type}
        parameters.pop(ORIGINAL, None)
        if self.rope_type == "llama3":
            parameters = {**LLAMA3_DEFAULTS, **parameters}
        if "attention_factor" in parameters:
            parameters["attention_factor"] = float(parameters["attention_factor"])
        if "factor" in own:
            parameters["factor"] = factor
        if ORIGINAL in REQUIRED_KEYS[self.rope_type]:
            stored = self.stored.get(ORIGINAL, self.length) if self.keeps_type else self.length
            parameters[ORIGINAL] = self.plan.get(ORIGINAL, stored)
            ratio = length / parameters[ORIGINAL]
            # transformers compares yarn's factor with the ratio of the lengths, which are whole tokens.
            if "beta_fast" in own and math.isclose(ratio, factor, abs_tol=1 / parameters[ORIGINAL]):
                parameters["factor"] = ratio
        return parameters

    def _check_frequencies(self, change: RopeChange, probe: int) -> None:
        """`probe` tokens are beyond both lengths, where types that depend on the text's length differ."""
        parameters, length = change.rope_parameters, change.max_position_embeddings
        old, new = (
            rope_frequencies(which, self.head_dim, max_position_embeddings=self.length)[0].numel()
            for which in (self.stored, parameters)
        )
        if old != new:
            raise ValueError(f"{self.name}: {self.plan} changes the rotary dim, {2 * old}, to {2 * new}")
        if _same_frequencies(self.stored, self.length, parameters, length, self.head_dim, probe):
            asked = "context alone" if not self.plan else f"{self.plan}"
            raise ValueError(
                f"{self.name}: {asked} changes no rotary frequency of {self.stored}; give a rope_type and a factor "
                "above 1, or a rope_theta with context"
            )


def _same_frequencies(
    a: Mapping[str, Any], a_length: int, b: Mapping[str, Any], b_length: int, head_dim: int, probe: int
) -> bool:
    """Whether two parameters, each at a length of the model, turn alike in short texts and in one of `probe` tokens."""
    for seq_len in (None, probe):
        one = rope_frequencies(a, head_dim, max_position_embeddings=a_length, seq_len=seq_len)
        other = rope_frequencies(b, head_dim, max_position_embeddings=b_length, seq_len=seq_len)
        if not torch.equal(one[0], other[0]) or one[1] != other[1]:
            return False
    return True
