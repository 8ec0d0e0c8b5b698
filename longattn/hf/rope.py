"""The stock rotary modules of a model: rebuild them from the config, and show that they turn by the config's angles."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from longattn.hf.families import Family
from longattn.rope import rope_frequencies, rope_layers
from longattn.rope_check import ORIGINAL
from longattn.rope_plan import RopeChange

__all__ = [
    "check_rotary_modules",
    "head_dim_of",
    "rebuild_rotary_modules",
    "rope_fields",
    "rotary_modules",
]

# before, transformers looked for the long frequencies of a layer type that it had not formed anew
LAYERED_LONGROPE = Version(transformers.__version__) >= Version("5.21.0")
# transformers forms the frequencies in float32; a wrong method, factor or theta is off by far more than its rounding
FREQUENCY_RTOL = 1e-5


def rotary_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The rotary modules of a model that are built from its config: (name, module)."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if "RotaryEmbedding" in type(module).__name__ and isinstance(getattr(module, "config", None), PreTrainedConfig)
    ]


def head_dim_of(config: PreTrainedConfig) -> int:
    """Channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_fields(config: PreTrainedConfig, family: Family, change: RopeChange) -> dict[str, Any]:
    """The config fields that a change of rope writes.

    Besides the two of `change` these are fields that transformers prefers to what `rope_parameters` say.

    Args:
        config: as it is before.
        family: the config's.
        change: the new parameters and length.

    Raises:
        ValueError: transformers would read other parameters from this config than `change` has.
    """
    layers = rope_layers(change.rope_parameters)
    family.check_rope({str(parameters["rope_type"]) for parameters in layers.values()})
    fields: dict[str, Any] = {
        "rope_parameters": change.rope_parameters,
        "max_position_embeddings": int(change.max_position_embeddings),
    }
    for layer_type, parameters in layers.items():
        if layer_type is not None and parameters.get("truncate") is False:
            raise ValueError(
                f"extend: rope[{layer_type!r}]['truncate'] must be true, got False: transformers reads it beside the "
                "layer types, for all of them"
            )
        if layer_type is not None and parameters["rope_type"] == "longrope" and not LAYERED_LONGROPE:
            raise ValueError(
                f"extend: rope[{layer_type!r}]['rope_type'] longrope needs transformers 5.21, got "
                f"{transformers.__version__}, which fails on the second long text"
            )
        if layer_type is not None and layer_type not in config.layer_types:
            if parameters != config.rope_parameters[layer_type]:
                raise ValueError(f"extend: rope changes {layer_type!r}, but no layer of the model is of that type")
        if layer_type is None and ORIGINAL in parameters and hasattr(config, ORIGINAL):
            fields[ORIGINAL] = parameters[ORIGINAL]  # Phi-3's configs keep it beside `rope_parameters` too
    if getattr(config, "head_dim", 0) is None:
        fields["head_dim"] = head_dim_of(config)  # transformers' yarn, dynamic and longrope fail on None
    return fields


def rebuild_rotary_modules(model: PreTrainedModel) -> None:
    """Give every rotary module the state that a fresh one has under the model's config, on the module's device.

    The module objects stay, with their hooks. The frequencies are formed anew in float32, whatever dtype the old
    buffers had been cast to, because that is what loading the saved checkpoint does.
    """
    for _, module in rotary_modules(model):
        device = next(module.buffers()).device
        with torch.device("cpu"):
            fresh = type(module)(config=model.config)
        for name, value in vars(fresh).items():
            if not name.startswith("_") and name != "training":
                setattr(module, name, value)
        for name in set(module._buffers) - set(fresh._buffers):
            delattr(module, name)
        for name, buffer in fresh._buffers.items():
            module.register_buffer(name, None if buffer is None else buffer.to(device), persistent=False)
        # what longrope and dynamic note when the first long text comes
        noted = [name for name in vars(module) if name.endswith(("long_inv_freq", "_max_seq_len_cached"))]
        for name in noted:
            delattr(module, name)


def check_rotary_modules(model: PreTrainedModel) -> str:
    """Compare every rotary module with `longattn.rope_frequencies` of the config.

    Returns:
        One line that says what was compared.

    Raises:
        RuntimeError: a module turns by other angles, or there is none.
    """
    config = model.config
    modules = rotary_modules(model)
    if not modules:
        raise RuntimeError(f"extend: {type(model).__name__} has no rotary module that could be rebuilt")
    for name, module in modules:
        if next(module.buffers()).device.type == "meta":
            with torch.device("cpu"):
                module = type(module)(config=config)
        for layer_type, parameters in rope_layers(config.rope_parameters).items():
            if layer_type is not None and layer_type not in config.layer_types:
                continue
            prefix = "" if layer_type is None else f"{layer_type}_"
            expected, scaling = rope_frequencies(
                parameters,
                head_dim_of(config),
                max_position_embeddings=config.max_position_embeddings,
            )
            found: Tensor = getattr(module, f"{prefix}inv_freq").detach().double().cpu()
            found_scaling = float(getattr(module, f"{prefix}attention_scaling"))
            if found.shape != expected.shape or not torch.allclose(found, expected, rtol=FREQUENCY_RTOL, atol=0.0):
                raise RuntimeError(
                    f"extend: {name}.{prefix}inv_freq does not follow config.rope_parameters {parameters}"
                )
            if abs(found_scaling - scaling) > FREQUENCY_RTOL * abs(scaling):
                raise RuntimeError(
                    f"extend: {name}.{prefix}attention_scaling is {found_scaling}, but rope_parameters give {scaling}"
                )
    return f"{len(modules)} rotary module(s) turn by the config's frequencies"
