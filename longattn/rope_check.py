"""Checks of a plan's rope that need no model; changes with the keys that a plan may give."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from longattn.pattern import MAX_TOKENS
from longattn.rope_keys import SCALING_KEYS, SHARED_KEYS, RopeValues, flat_parameters, is_nested, nearest, rope_keys

__all__ = ["ORIGINAL", "check_keys_fit", "check_length", "check_rope"]

ORIGINAL = "original_max_position_embeddings"


def check_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Check a plan's `rope` as far as that goes without a model.

    Args:
        rope: keys of transformers' `rope_parameters`, or one such dict per layer type.

    Returns:
        A copy with `rope_type` for the older name `type`.

    Raises:
        TypeError: it is no mapping, or a layer type's part isn't.
        ValueError: a key or type is unknown, a key doesn't belong to the type, a value is out of range.
    """
    if not isinstance(rope, Mapping):
        raise TypeError(f"Plan: rope must be a mapping such as {{'rope_type': 'yarn', 'factor': 8.0}}, got {rope!r}")
    if not is_nested(rope):
        return _check_flat(rope, "rope")
    for layer_type, part in rope.items():
        if not isinstance(part, Mapping):
            raise TypeError(f"Plan: rope[{layer_type!r}] must be a mapping like the other layer types', got {part!r}")
    return {layer_type: _check_flat(part, f"rope[{layer_type!r}]") for layer_type, part in rope.items()}


def _check_flat(rope: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not rope:
        raise ValueError(f"Plan: {name} must name at least one key, got {{}}")
    allowed = SCALING_KEYS | set(SHARED_KEYS)
    for key, value in rope.items():
        if key not in allowed:
            raise ValueError(f"Plan: {name} has an unknown key {key!r}{nearest(str(key), allowed)}")
        if value is None:
            raise ValueError(f"Plan: {name}[{key!r}] must have a value, got None")
    parameters: dict[str, Any] = {key: _json_able(value) for key, value in rope.items()}
    if "type" in parameters:
        old = parameters.pop("type")
        if parameters.setdefault("rope_type", old) != old:
            raise ValueError(f"Plan: {name} has rope_type {parameters['rope_type']!r} and type {old!r}, which differ")
    if "rope_type" in parameters:
        flat_parameters(f"Plan: {name}", {"rope_type": parameters["rope_type"]})
        check_keys_fit(parameters, parameters["rope_type"], f"Plan: {name}")
    _check_values(parameters, name)
    return parameters


def _json_able(value: Any) -> Any:
    """A copy with lists for tuples, and Python's numbers for those of other libraries, which config.json can't hold."""
    if isinstance(value, (list, tuple)):
        return [_json_able(entry) for entry in value]
    if isinstance(value, Real) and not isinstance(value, (int, float)):
        with contextlib.suppress(OverflowError):  # a number that no float holds is refused as it is
            return int(value) if isinstance(value, Integral) else float(value)
    return copy.deepcopy(value)


def check_keys_fit(parameters: Mapping[str, Any], rope_type: str, name: str) -> None:
    """The original length is told with any type: the factor counts from it."""
    fitting = rope_keys(rope_type) | set(SHARED_KEYS) | {ORIGINAL}
    for key in parameters:
        if key not in fitting:
            own = ", ".join(sorted(rope_keys(rope_type))) or "none; name another rope_type, such as 'yarn'"
            raise ValueError(f"{name}: rope_type '{rope_type}' has no key '{key}'; its own keys are {own}")


def _check_values(parameters: Mapping[str, Any], name: str) -> None:
    values = RopeValues(f"Plan: {name}", {"rope_type": "any", **parameters})
    for key, value in parameters.items():
        if key == "factor":
            values.factor()
        elif key == "rope_theta":
            values.theta()
        elif key == ORIGINAL:
            check_length(f"Plan: {name}[{key!r}]", value)
        elif key in ("short_factor", "long_factor"):
            values.numbers(key, len(value) if isinstance(value, list) else 0)
        elif key == "truncate":
            values.flag(key, True)
        elif key != "rope_type":
            values.number(key, above=0.0)
    if (share := values.number("partial_rotary_factor", 1.0)) > 1.0:
        raise ValueError(f"Plan: {name}['partial_rotary_factor'] must be at most 1, got {share:g}")


def check_length(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, a number of tokens, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1 token, got {value}")
    if value > MAX_TOKENS:
        raise ValueError(f"{name} must be at most 10^15 tokens, got {value}")
