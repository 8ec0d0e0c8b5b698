"""Reads and checks rotary parameters; changes with the layout of transformers' `rope_parameters`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

# What a rope type needs and what it may have, beyond the keys that every type shares.
REQUIRED_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor",),
    "by-parts": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "proportional": (),
}
OPTIONAL_KEYS: dict[str, tuple[str, ...]] = {
    "dynamic": ("alpha",),
    "by-parts": ("beta_fast", "beta_slow", "truncate"),
    "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor", "short_mscale", "long_mscale"),
    "proportional": ("factor",),
}
SHARED_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
MAX_HEAD_DIM = 2**16
# Keys that checkpoints keep beside the rotary parameters and that the frequencies don't depend on.
FOREIGN_KEYS = (
    "mrope_section",
    "mrope_interleaved",
    "interleaved",
    "xdrope_section",
    "llama_4_scaling_beta",
    "max_position_embeddings",
    "finetuned",
)
# Older names that checkpoints still carry.
TYPE_ALIASES = {"su": "longrope", "mrope": "default"}

SCALING_KEYS = frozenset(key for table in (REQUIRED_KEYS, OPTIONAL_KEYS) for keys in table.values() for key in keys)
KNOWN_KEYS = frozenset(SHARED_KEYS) | frozenset(FOREIGN_KEYS) | SCALING_KEYS


def rope_keys(rope_type: str) -> frozenset[str]:
    """The scaling keys a rope type reads (`factor`, `beta_fast`, ...), without those that every type shares."""
    return frozenset(REQUIRED_KEYS[rope_type]) | frozenset(OPTIONAL_KEYS.get(rope_type, ()))


def nearest(name: str, known: Iterable[str]) -> str:
    """A "did you mean" clause, empty where nothing known is near."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{match[0]}'?" if match else ""


def is_nested(rope_parameters: Mapping[str, Any]) -> bool:
    """Whether a dict holds one dict (or None, a layer type without rope) per layer type."""
    values = [value for key, value in rope_parameters.items() if key not in KNOWN_KEYS and key != "rope_scaling"]
    return any(isinstance(value, Mapping) for value in values)


def flat_parameters(caller: str, rope_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """One layer type's parameters as a dict: v4 layout unfolded, `rope_type` set, None values left out, keys known."""
    if not isinstance(rope_parameters, Mapping):
        raise TypeError(f"{caller}: rope_parameters must be a dict, got {type(rope_parameters).__name__}")
    if is_nested(rope_parameters):
        names = ", ".join(repr(key) for key in rope_parameters)
        raise ValueError(
            f"{caller}: rope_parameters holds one dict per layer type ({names}); pass one layer type's dict "
            "(longattn.rope.rope_layers lists them)"
        )
    outer = dict(rope_parameters)
    inner = outer.pop("rope_scaling", None) or {}  # v4 configs keep it, or None, beside `rope_theta`
    if not isinstance(inner, Mapping):
        raise TypeError(f"{caller}: rope_scaling must be a dict or None, got {type(inner).__name__}")
    for key in (*inner, *outer):
        if key not in KNOWN_KEYS:
            raise ValueError(f"{caller}: rope_parameters has an unknown key '{key}'{nearest(str(key), KNOWN_KEYS)}")
    parameters = {key: value for part in (inner, outer) for key, value in part.items() if value is not None}
    parameters["rope_type"] = _rope_type(caller, parameters)
    parameters.pop("type", None)
    return parameters


def _rope_type(caller: str, parameters: Mapping[str, Any]) -> str:
    name = parameters.get("rope_type", parameters.get("type"))
    if name is None:
        if scaling := sorted(key for key in parameters if key in SCALING_KEYS):
            raise ValueError(f"{caller}: rope_parameters has '{scaling[0]}' but no 'rope_type'")
        return "default"
    name = TYPE_ALIASES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in REQUIRED_KEYS:
        known = ", ".join(REQUIRED_KEYS)
        raise ValueError(f"{caller}: rope_type must be one of {known}, got '{name}'{nearest(str(name), REQUIRED_KEYS)}")
    return name


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


class RopeValues:
    """Checked access to the values of flat rotary parameters; every error names the caller, the key and the value."""

    def __init__(self, caller: str, parameters: Mapping[str, Any]) -> None:
        self.caller = caller
        self.parameters = parameters

    def __contains__(self, key: str) -> bool:
        return key in self.parameters

    @property
    def rope_type(self) -> str:
        return self.parameters["rope_type"]

    def number(
        self, key: str, default: float | None = None, *, at_least: float = -math.inf, above: float = -math.inf
    ) -> float:
        """A finite number; `default` where the key is absent, an error where there is no default either."""
        value = self.parameters.get(key, default)
        if value is None:
            raise ValueError(f"{self.caller}: rope_parameters of type '{self.rope_type}' needs '{key}'")
        if not _is_finite(value) or value < at_least or value <= above:
            bound = f" of at least {at_least:g}" if at_least > -math.inf else ""
            bound += f" above {above:g}" if above > -math.inf else ""
            raise ValueError(f"{self.caller}: rope_parameters['{key}'] must be a finite number{bound}, got {value!r}")
        return float(value)

    def numbers(self, key: str, count: int) -> list[float]:
        """A list of `count` positive numbers."""
        values = self.parameters.get(key)
        if values is None:
            raise ValueError(f"{self.caller}: rope_parameters of type '{self.rope_type}' needs '{key}'")
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"{self.caller}: rope_parameters['{key}'] must be a list of numbers, got {values!r}")
        if len(values) != count:
            raise ValueError(
                f"{self.caller}: rope_parameters['{key}'] must have {count} numbers (half the rotary dim), "
                f"got {len(values)}"
            )
        for index, value in enumerate(values):
            if not _is_finite(value) or value <= 0:
                raise ValueError(
                    f"{self.caller}: rope_parameters['{key}'][{index}] must be a finite number above 0, got {value!r}"
                )
        return [float(value) for value in values]

    def flag(self, key: str, default: bool) -> bool:
        """True or False."""
        value = self.parameters.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.caller}: rope_parameters['{key}'] must be true or false, got {value!r}")
        return value

    def theta(self) -> float:
        """The base of the frequencies. Never defaulted: a lost theta is the commonest way to ruin a model."""
        if "rope_theta" not in self.parameters:
            raise ValueError(
                f"{self.caller}: rope_parameters needs 'rope_theta' (a v4 config keeps it beside rope_scaling: "
                "pass {'rope_scaling': ..., 'rope_theta': ...})"
            )
        return self.number("rope_theta", above=1.0)

    def factor(self) -> float:
        """How many times longer the context becomes."""
        return self.number("factor", at_least=1.0)

    def refuse_temperature(self) -> None:
        """By-parts is yarn without its temperature, so another `attention_factor` contradicts the type."""
        if self.number("attention_factor", 1.0) != 1.0:
            raise ValueError(
                f"{self.caller}: rope_type 'by-parts' is yarn with attention_factor 1.0, "
                f"got attention_factor {self.number('attention_factor'):g}; use rope_type 'yarn'"
            )

    def rotary_dim(self, head_dim: int) -> int:
        """The leading channels of a head that rotate, an even number."""
        if isinstance(head_dim, bool) or not isinstance(head_dim, int):
            raise TypeError(f"{self.caller}: head_dim must be an int, got {type(head_dim).__name__}")
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"{self.caller}: head_dim must be an even number of at least 2, got {head_dim}")
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(f"{self.caller}: head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}")
        share = self.number("partial_rotary_factor", 1.0, above=0.0)
        if share > 1.0:
            raise ValueError(f"{self.caller}: rope_parameters['partial_rotary_factor'] must be at most 1, got {share}")
        if self.rope_type == "proportional":
            return head_dim
        rotary_dim = int(head_dim * share)
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(
                f"{self.caller}: the rotary dim must be an even number of at least 2, got {rotary_dim} "
                f"(head_dim {head_dim} x partial_rotary_factor {share:g})"
            )
        return rotary_dim
