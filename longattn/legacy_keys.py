"""What readers of transformers 4 look for in config.json and tokenizer_config.json; changes with those readers.

transformers 5 keeps the rotary base, its scaling and the share of a head that turns in `rope_parameters`, and the dtype
in `dtype`. Version 4, and servers of its time, read `rope_theta`, `rope_scaling`, `partial_rotary_factor`,
`original_max_position_embeddings` and `torch_dtype`; a config without them is read as one with a base of 10,000.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longattn.rope_check import ORIGINAL
from longattn.rope_keys import REQUIRED_KEYS, is_nested

__all__ = ["legacy_config_keys", "legacy_tokenizer_config"]

# GPT-NeoX has names of its own in both versions.
NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
OUTSIDE = ("rope_theta", "partial_rotary_factor")
# Types of version 5 alone. Version 4 refuses a type that it does not know, so the key is written all the same.
NEW_TYPES = frozenset({"proportional"})
# Families whose version 4 takes `type` and exactly these keys, and refuses all others: the types, the keys.
EXACT_KEYS = {
    "phi3": (("longrope",), ("short_factor", "long_factor")),
    "olmo": (("linear", "dynamic"), ("factor",)),
    "olmo2": (("linear", "dynamic"), ("factor",)),
}


def legacy_config_keys(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The keys of transformers 4 that say what a config of version 5 says.

    transformers 5 reads them too, and where both are there `rope_scaling` goes before `rope_parameters`: the two hold
    the same values.

    Args:
        fields: config.json as transformers 5 writes it.

    Returns:
        The keys to add, and what version 4 can't read.

    Example:
        >>> rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
        >>> legacy_config_keys({"model_type": "llama", "rope_parameters": rope})[0]
        {'rope_theta': 10000.0, 'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}}
    """
    model_type, rope = fields["model_type"], fields.get("rope_parameters") or {}
    keys: dict[str, Any] = {} if fields.get("dtype") is None else {"torch_dtype": fields["dtype"]}
    unreadable = []
    if model_type == "qwen3_moe" and "num_local_experts" in fields:
        keys["num_experts"] = fields["num_local_experts"]
    if model_type == "qwen2_moe" and len(set(fields.get("layer_types") or ())) > 1:
        unreadable.append("transformers 4 of qwen2_moe reads no layer_types: windows of some layers need version 5")
    if not is_nested(rope):
        rope_keys, reason = _flat_keys(rope, model_type)
    elif (nested := _nested_keys(rope, model_type)) is not None:
        rope_keys, reason = nested, None
    else:
        rope_keys, reason = {}, f"transformers 4 of {model_type} has no keys for ropes that differ so: use version 5"
    return {**keys, **rope_keys}, [*unreadable, *([] if reason is None else [reason])]


def _flat_keys(rope: Mapping[str, Any], model_type: str) -> tuple[dict[str, Any], str | None]:
    names = NAMES.get(model_type, {})
    keys = {names.get(key, key): rope[key] for key in OUTSIDE if key in rope}
    scaling = _scaling(rope)
    if scaling is None:
        return keys, None
    rope_type = scaling["rope_type"]
    if ORIGINAL in REQUIRED_KEYS.get(rope_type, ()):
        keys[ORIGINAL] = rope[ORIGINAL]  # version 4 looks for longrope's here alone, llama.cpp once for llama3's
    unreadable = None
    if model_type in EXACT_KEYS:
        types, exact = EXACT_KEYS[model_type]
        if rope_type in types and "attention_factor" not in scaling:
            scaling = {"type": rope_type, **{key: scaling[key] for key in exact}}
        else:
            unreadable = f"transformers 4 of {model_type} reads only {', '.join(types)}, with {', '.join(exact)} alone"
    elif rope_type in NEW_TYPES:
        unreadable = f"transformers 4 has no rope_type {rope_type!r}"
    return {**keys, "rope_scaling": scaling}, unreadable


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` of flat parameters; None where nothing is scaled."""
    if rope.get("rope_type", "default") == "default":
        return None
    return {key: value for key, value in rope.items() if key not in OUTSIDE}


def _nested_keys(rope: Mapping[str, Any], model_type: str) -> dict[str, Any] | None:
    """Version 4 of Gemma 3 and OLMo 3 scales the layers that see everything, and no others."""
    full, sliding = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
    if not full or _scaling(sliding) is not None:
        return None
    keys = {"rope_theta": full["rope_theta"]}
    if model_type == "gemma3_text":
        keys["rope_local_base_freq"] = sliding.get("rope_theta", 10000.0)
    elif model_type != "olmo3" or sliding.get("rope_theta", full["rope_theta"]) != full["rope_theta"]:
        return None
    scaling = _scaling(full)
    return keys if scaling is None else {**keys, "rope_scaling": scaling}


def legacy_tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json in the names that transformers 4 and 5 both read."""
    renamed = dict(fields)
    if renamed.get("tokenizer_class") == "TokenizersBackend":
        renamed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(renamed.get("extra_special_tokens"), list):  # version 4 takes a mapping by that name
        renamed["additional_special_tokens"] = renamed.pop("extra_special_tokens")
    return renamed
