"""What to change in a model: the plan, the same in Python, YAML and flags; changes with what a plan can say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from longattn.pattern import Pattern, parse_pattern, parse_patterns
from longattn.rope_check import check_rope
from longattn.rope_keys import nearest

__all__ = ["Plan"]

TOKEN_KEYS = ("tokens", "special", "init", "output_init", "pad_to_multiple_of")


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What `longattn.extend` changes; every part may be absent, not all.

    Args:
        rope: keys to merge into the model's `rope_parameters`, or one such dict per layer type.
        context: the new length in tokens; gives the factor where `rope` gives none.
        attention: patterns cycled over the layers ("3 x window:4096+sinks:4, 1 x full"), or a list, one a layer.
        train_attention: the same, while the model trains; by default as `attention`.
        tokens: `longattn.add_tokens`' arguments.

    Raises:
        TypeError: a part is of another type than these.
        ValueError: no part is given, or one holds an unknown key or an impossible value.

    Example:
        >>> plan = Plan(rope={"rope_type": "yarn", "factor": 8.0}, attention="3 x window:4096+sinks:4, 1 x full")
        >>> plan == Plan.from_dict(plan.to_dict())
        True
    """

    rope: Mapping[str, Any] | None = None
    context: int | None = None
    attention: str | Sequence[str] | None = None
    train_attention: str | Sequence[str] | None = None
    tokens: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        checks: dict[str, Callable[[Any], Any]] = {
            "rope": check_rope,
            "context": _check_context,
            "attention": lambda value: _check_attention("attention", value),
            "train_attention": lambda value: _check_attention("train_attention", value),
            "tokens": _check_tokens,
        }
        if all(getattr(self, part) is None for part in checks):
            raise ValueError(f"Plan: give at least one of {', '.join(checks)}")
        for part, check in checks.items():
            value = getattr(self, part)
            if value is not None:
                object.__setattr__(self, part, check(value))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return all(_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Plan:
        """Make a plan of a mapping with the keys rope, context, attention, train_attention, tokens.

        Raises:
            TypeError: it is no mapping, or a part is of the wrong type.
            ValueError: a key is unknown, or a value impossible.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(mapping, Mapping):
            raise TypeError(f"Plan: a plan must be a mapping with the keys {', '.join(known)}, got {mapping!r}")
        for key in mapping:
            if key not in known:
                raise ValueError(
                    f"Plan: unknown key {key!r}{nearest(str(key), known)}; the keys are {', '.join(known)}"
                )
        return cls(**mapping)

    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan from a YAML file with the keys of `from_dict`.

        Raises:
            OSError: the file can't be read.
            TypeError: it holds no mapping, or a part is of the wrong type.
            ValueError: it is not YAML, repeats a key, has an unknown one, or an impossible value.
        """
        from longattn.plan_yaml import load_yaml

        with open(path, encoding="utf-8") as file:
            return cls.from_dict(load_yaml(file, str(path)))

    def to_dict(self) -> dict[str, Any]:
        """The parts that are given, in JSON's types; a tensor or a callable in `tokens` is recorded by that word."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _storable(value) for name, value in parts.items() if value is not None}

    def attention_patterns(self, num_layers: int) -> list[Pattern] | None:
        """Each layer's pattern when the model serves; None where the plan leaves attention alone."""
        return None if self.attention is None else parse_patterns(self.attention, num_layers)

    def train_patterns(self, num_layers: int) -> list[Pattern] | None:
        """Each layer's pattern when the model trains; None where the plan leaves attention alone."""
        if self.train_attention is None:
            return self.attention_patterns(num_layers)
        return parse_patterns(self.train_attention, num_layers)


def _check_context(context: int) -> int:
    if isinstance(context, bool) or not isinstance(context, int):
        raise TypeError(f"Plan: context must be an int, the new length in tokens, got {context!r}")
    if context < 1:
        raise ValueError(f"Plan: context must be at least 1 token, got {context}")
    return context


def _check_attention(part: str, attention: Any) -> str | list[str]:
    """Checks every pattern; a model's number of layers is not known yet."""
    if isinstance(attention, Pattern):
        return str(attention)
    if not isinstance(attention, str) and (not isinstance(attention, Sequence) or isinstance(attention, bytes)):
        raise TypeError(f"Plan: {part} must be a text such as 'window:4096' or a list of them, got {attention!r}")
    try:
        if isinstance(attention, str):
            parse_patterns(attention, 1)
            return attention.strip()
        if not attention:
            raise ValueError("the list must hold one pattern a layer, got []")
        return [str(entry if isinstance(entry, Pattern) else parse_pattern(entry)) for entry in attention]
    except (TypeError, ValueError) as error:
        raise type(error)(f"Plan: {part}: {error}") from None


def _check_tokens(tokens: Any) -> dict[str, Any]:
    if not isinstance(tokens, Mapping):
        raise TypeError(
            f"Plan: tokens must be a mapping such as {{'tokens': ['<tool>'], 'init': 'mean'}}, got {tokens!r}"
        )
    for key in tokens:
        if key not in TOKEN_KEYS:
            raise ValueError(f"Plan: tokens has an unknown key {key!r}{nearest(str(key), TOKEN_KEYS)}")
    names = tokens.get("tokens")
    if isinstance(names, str) or not isinstance(names, (Mapping, Sequence)):
        raise TypeError(f"Plan: tokens['tokens'] must be a list, or a mapping from role to token, got {names!r}")
    if not names:
        raise ValueError(f"Plan: tokens['tokens'] must name at least one token, got {names!r}")
    if not isinstance(tokens.get("special", True), bool):
        raise TypeError(f"Plan: tokens['special'] must be true or false, got {tokens['special']!r}")
    for name in _token_entries(names):
        if not isinstance(name, str) and not hasattr(name, "content"):
            raise TypeError(f"Plan: tokens['tokens'] must hold texts (or AddedToken), got {name!r}")
    for key in ("init", "output_init"):
        init = tokens.get(key, "mean")
        if not isinstance(init, (str, Mapping, Tensor)) and not callable(init) and (init is not None or key == "init"):
            raise TypeError(
                f"Plan: tokens[{key!r}] must be a text, a mapping from token to description, a tensor or a callable, "
                f"got {init!r}"
            )
    multiple = tokens.get("pad_to_multiple_of")
    if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int)):
        raise TypeError(f"Plan: tokens['pad_to_multiple_of'] must be an int, got {multiple!r}")
    if multiple is not None and multiple < 1:
        raise ValueError(f"Plan: tokens['pad_to_multiple_of'] must be at least 1, got {multiple}")
    return {**tokens, "tokens": dict(names) if isinstance(names, Mapping) else list(names)}


def _token_entries(names: Mapping[str, Any] | Sequence[Any]) -> Iterator[Any]:
    for name in names.values() if isinstance(names, Mapping) else names:
        if isinstance(names, Mapping) and isinstance(name, Sequence) and not isinstance(name, str):
            yield from name
        else:
            yield name


def _equal(one: Any, other: Any) -> bool:
    """Equality of plans' parts, which may hold tensors."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)


def _storable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _storable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(entry) for entry in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    if hasattr(value, "content"):  # tokenizers.AddedToken
        return value.content
    return "callable" if callable(value) else "tensor"
