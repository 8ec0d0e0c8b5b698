"""Which stock architecture has a model's weights and windows in given layers; changes with those of transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longattn.hf.families import FAMILIES, WINDOWED, Family
from longattn.rope_keys import is_nested

__all__ = ["parameters_of", "with_windows"]

FULL = "full_attention"
# Architectures with the same weights, to be tried in this order where the model's own has no such windows. SmolLM3
# alone has Llama's biases, which show in the weights.
SIBLINGS = {"llama": ("mistral", "ministral", "smollm3"), "mistral": ("ministral",), "olmo2": ("olmo3",)}
BIASES = ("attention_bias", "mlp_bias")
# What a sibling's config need not have: biases that are there show in the weights.
LEFT_BEHIND = ("pretraining_tp", "auto_map", *BIASES)


def with_windows(config: PreTrainedConfig, sizes: Sequence[int | None]) -> PreTrainedConfig:
    """Find the config of the first architecture that has a model's weights and the windows that are asked for.

    Args:
        config: the model's; where its own architecture serves, it is changed and returned.
        sizes: each layer's window in tokens, None where it sees all; at most one size.

    Raises:
        ValueError: there is no such architecture; says which were looked at, and what each lacks.
    """
    reasons = []
    for model_type in (config.model_type, *SIBLINGS.get(config.model_type, ())):
        family = FAMILIES[model_type]
        reason = _against(family, config, sizes)
        if reason is None and model_type == config.model_type:
            return _windowed(family, config, sizes)
        if reason is None:
            target = _sibling(family, config, sizes)
            if parameters_of(target) == parameters_of(config):
                return target
            reason = f"has other weights than this {config.model_type}"
        reasons.append(f"{model_type} {reason}")
    raise ValueError(
        f"export: no stock architecture has the weights of this {config.model_type} and windows in these layers: "
        f"{'; '.join(reasons)}; write the checkpoint without export and load it with longattn"
    )


def parameters_of(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Names and shapes of the parameters that a model of this config has."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _against(family: Family, config: PreTrainedConfig, sizes: Sequence[int | None]) -> str | None:
    """Why an architecture can't say which layers have windows; None where it can."""
    if family.windows == "none":
        return None if set(sizes) == {None} else "has no windows"
    if family.windows == "shared" and len(set(sizes)) > 1:
        return "has the same window in all layers"
    if family.windows == "layered" and getattr(config, "layer_types", _layer_types(sizes)) != _layer_types(sizes):
        if family.rotates == "windowed":
            return "rotates the layers that have windows and no others, so windows must stay in their layers"
        ropes = config.rope_parameters
        if is_nested(ropes) and ropes.get(FULL) != ropes.get(WINDOWED):
            return "has one rope for layers with windows and one for the others, so windows must stay in their layers"
    return None


def _layer_types(sizes: Sequence[int | None]) -> list[str]:
    return [FULL if size is None else WINDOWED for size in sizes]


def _window_fields(family: Family, sizes: Sequence[int | None]) -> dict[str, Any]:
    window = next((size for size in sizes if size is not None), None)
    fields: dict[str, Any] = {"sliding_window": window}
    if family.windows == "layered":
        fields["layer_types"] = _layer_types(sizes)
    known = CONFIG_MAPPING[family.model_type]()
    if hasattr(known, "use_sliding_window"):
        fields["use_sliding_window"] = window is not None
    if hasattr(known, "max_window_layers"):
        # readers that know no layer_types give windows to all layers from here on
        fields["max_window_layers"] = next((i for i, size in enumerate(sizes) if size is not None), len(sizes))
    return fields


def _windowed(family: Family, config: PreTrainedConfig, sizes: Sequence[int | None]) -> PreTrainedConfig:
    """The config with other windows."""
    for name, value in _window_fields(family, sizes).items():
        setattr(config, name, value)
    return config


def _sibling(family: Family, config: PreTrainedConfig, sizes: Sequence[int | None]) -> PreTrainedConfig:
    """A config of another architecture with these windows, all else as it was."""
    carried = {key: value for key, value in config.to_dict().items() if key not in (*LEFT_BEHIND, "model_type")}
    fields = _window_fields(family, sizes)
    fields["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]]
    if family.model_type == "olmo3":
        fields["rope_parameters"] = {kind: dict(config.rope_parameters) for kind in (FULL, WINDOWED)}
    if family.rotates == "listed":
        fields["no_rope_layers"] = [1] * len(sizes)
        fields |= {name: getattr(config, name) for name in BIASES}
    return CONFIG_MAPPING[family.model_type](**{**carried, **fields})
