"""Which stock architecture has a model's weights and windows in given layers; changes with those of transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["parameters_of", "windows_of", "with_windows"]

FULL, SLIDING = "full_attention", "sliding_attention"
# What the config of another architecture with the same weights need not have: biases show in the weights.
LEFT_BEHIND = ("pretraining_tp", "attention_bias", "mlp_bias")


@dataclass(frozen=True)
class _Home:
    """An architecture that can say which layers have windows.

    Args:
        model_type: its name.
        windows: "shared", one for all layers, or "layered", one size for the layers that `layer_types` names.
        layer_types: what else these decide: nothing, the layer's rope ("rope"), or whether it rotates ("rotates").
        fields: further fields that it needs.
    """

    model_type: str
    windows: Literal["shared", "layered"]
    layer_types: Literal["", "rope", "rotates"] = ""
    fields: tuple[tuple[str, Any], ...] = ()


MISTRAL, MINISTRAL = _Home("mistral", "shared"), _Home("ministral", "layered")
SMOLLM3 = _Home("smollm3", "layered", fields=(("use_sliding_window", True),))  # the one with Llama's biases
OLMO3 = _Home("olmo3", "layered", "rope")
SWITCH = (("use_sliding_window", True),)
HOMES = {
    "llama": (MISTRAL, MINISTRAL, SMOLLM3),
    "mistral": (MISTRAL, MINISTRAL),
    "qwen2": (_Home("qwen2", "layered", fields=SWITCH),),
    "qwen3": (_Home("qwen3", "layered", fields=SWITCH),),
    "gemma2": (_Home("gemma2", "layered"),),
    "gemma3_text": (_Home("gemma3_text", "layered", "rope"),),
    "gpt_oss": (_Home("gpt_oss", "layered"),),
    "cohere2": (_Home("cohere2", "layered", "rotates"),),
    "olmo2": (OLMO3,),
    "olmo3": (OLMO3,),
    "phi3": (_Home("phi3", "shared"),),
}


def with_windows(config: PreTrainedConfig, sizes: list[int | None]) -> PreTrainedConfig:
    """Find the config of the first architecture that has a model's weights and the windows that are asked for.

    Args:
        config: the model's; where its own architecture serves, it is changed and returned.
        sizes: each layer's window in tokens, None where it sees all.

    Raises:
        ValueError: there is no such architecture; says which were looked at, and what each lacks.
    """
    homes = HOMES.get(config.model_type, ())
    reasons = []
    for home in homes:
        reason = _against(home, config, sizes)
        if reason is None:
            target = _moved(home, config, sizes)
            if target.model_type == config.model_type or parameters_of(target) == parameters_of(config):
                return target
            reason = f"has other weights than this {config.model_type}"
        reasons.append(f"{home.model_type} {reason}")
    raise ValueError(
        f"export: no stock architecture has the weights of this {config.model_type} and windows in these layers"
        + (f": {'; '.join(reasons)}" if reasons else "")
        + "; write the checkpoint without export and load it with longattn"
    )


def _against(home: _Home, config: PreTrainedConfig, sizes: list[int | None]) -> str | None:
    """Why a home can't say which layers have windows; None where it can."""
    if home.windows == "shared" and len(set(sizes)) > 1:
        return "has the same window in all layers"
    own = getattr(config, "layer_types", None)
    if home.layer_types and own is not None and own != _layer_types(sizes):
        if home.layer_types == "rotates":
            return "rotates the layers that have windows and no others, so windows must stay in their layers"
        ropes = config.rope_parameters
        if ropes.get(FULL) != ropes.get(SLIDING):
            return (
                "has one rope for layers with windows and another for the others, so windows must stay in their layers"
            )
    return None


def _layer_types(sizes: Sequence[int | None]) -> list[str]:
    return [FULL if size is None else SLIDING for size in sizes]


def _moved(home: _Home, config: PreTrainedConfig, sizes: list[int | None]) -> PreTrainedConfig:
    """A config of the home's architecture with these windows, all else as it was."""
    window = next((size for size in sizes if size is not None), None)
    fields: dict[str, Any] = {"sliding_window": window, **dict(home.fields)}
    if "use_sliding_window" in fields:
        fields["use_sliding_window"] = window is not None
    if home.windows == "layered":
        fields["layer_types"] = _layer_types(sizes)
    if hasattr(config, "max_window_layers"):  # for readers that know no layer_types: they window the layers after these
        fields["max_window_layers"] = next((i for i, size in enumerate(sizes) if size is not None), len(sizes))
    if home.model_type == "smollm3":
        fields["no_rope_layers"] = [1] * len(sizes)
    if home.model_type == config.model_type:
        for name, value in fields.items():
            setattr(config, name, value)
        return config
    if home.layer_types == "rope":
        fields["rope_parameters"] = {kind: dict(config.rope_parameters) for kind in (FULL, SLIDING)}
    carried = {key: value for key, value in config.to_dict().items() if key not in (*LEFT_BEHIND, "auto_map")}
    if home.model_type == "smollm3":
        carried |= {name: getattr(config, name) for name in LEFT_BEHIND if hasattr(config, name)}
    fields["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[home.model_type]]
    carried.pop("model_type")
    return CONFIG_MAPPING[home.model_type](**{**carried, **fields})


def windows_of(config: PreTrainedConfig) -> list[int | None]:
    """Each layer's window as stock transformers reads it."""
    size, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds is None:
        return [size] * config.num_hidden_layers
    return [size if kind == SLIDING else None for kind in kinds]


def parameters_of(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Names and shapes of a model's parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
