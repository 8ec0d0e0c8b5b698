"""The record that a changed model carries in `config.longattn`: its plan, its patterns, and what was there before.

{"version": 1,
 "plan": the last plan, "earlier_plans": those before it,
 "original": {config field: its value before the first plan},
 "original_tokenizer": {"model_max_length": its length before the first plan that changed it, None without limit},
 "attention": [one pattern a layer], "train_attention": the same}   # only where a plan had an attention part
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedConfig

from longattn.pattern import Pattern

__all__ = [
    "IMPLEMENTATION",
    "VERSION",
    "as_fields",
    "layer_patterns",
    "original_fields",
    "read_record",
    "save_implementation",
]

IMPLEMENTATION = "longattn"
VERSION = 1


def read_record(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The record of a config, or None where no plan was applied."""
    record = getattr(config, "longattn", None)
    if record is None:
        return None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        version = record.get("version") if isinstance(record, dict) else record
        raise ValueError(
            f"longattn: config.longattn must be a record of version {VERSION}, got {version!r}; update longattn"
        )
    return record


def original_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The config fields that plans changed, as they were before the first plan."""
    record = read_record(config)
    return {} if record is None else record["original"]


def layer_patterns(config: PreTrainedConfig, part: str = "attention") -> list[Pattern] | None:
    """Each layer's pattern as recorded, "attention" for serving or "train_attention"; None where there is none."""
    record = read_record(config)
    layers = None if record is None else record.get(part)
    return None if layers is None else [Pattern(**fields) for fields in layers]


def as_fields(pattern: Pattern) -> dict[str, Any]:
    """A pattern in JSON's types: read by every call of a layer, so no text that would need parsing."""
    return {
        "kind": pattern.kind,
        "size": pattern.size,
        "shift": pattern.shift,
        "sinks": pattern.sinks,
    }


def save_implementation() -> None:
    """Have every saved config whose record has attention patterns ask for longattn's attention when it is loaded.

    transformers reads `attn_implementation` from config.json but never writes it, so a model that is loaded and saved
    again would come back without its patterns.
    """
    stock = PreTrainedConfig.to_dict
    if getattr(stock, "writes_longattn", False):
        return

    @functools.wraps(stock)
    def to_dict(self: PreTrainedConfig) -> dict[str, Any]:
        output = stock(self)
        record = output.get("longattn")
        if isinstance(record, dict) and "attention" in record:
            output["attn_implementation"] = IMPLEMENTATION
        return output

    to_dict.writes_longattn = True  # type: ignore[attr-defined]
    PreTrainedConfig.to_dict = to_dict  # type: ignore[method-assign]
