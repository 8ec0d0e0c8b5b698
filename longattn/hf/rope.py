"""A model's rope: the config's fields, and the stock rotary modules, rebuilt from them and shown to turn by them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from longattn.hf.families import Family
from longattn.hf.record import layer_patterns, original_fields
from longattn.rope import rope_frequencies, rope_layers
from longattn.rope_check import ORIGINAL
from longattn.rope_keys import is_nested
from longattn.rope_plan import RopeChange

__all__ = [
    "check_rotary_modules",
    "head_dim_of",
    "kept_ropes",
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


def kept_ropes(config: PreTrainedConfig, family: Family) -> list[str]:
    """Notes on layers that see further than their own window did by a rope that no plan has changed.

    Models with a rope for each layer type were trained to turn the keys of their windows only by one of them. A plan's
    attention may show more keys to these layers, while its rope, unless it names layer types, is that of the others.

    Args:
        config: as it is after a plan.
        family: the config's.
    """
    before, after = original_fields(config).get("rope_parameters"), config.rope_parameters
    if before is None or not is_nested(after):
        return []
    kept = {layer_type: rope for layer_type, rope in rope_layers(after).items() if rope == before.get(layer_type)}
    if kept == rope_layers(after):
        return []
    patterns = [layer_patterns(config, part) for part in ("attention", "train_attention")]
    rows = zip(config.layer_types, family.windows_of(config), family.rotating_layers(config), strict=True)
    wider: dict[str, list[int]] = {}
    for layer, (layer_type, window, rotates) in enumerate(rows):
        seen = [part[layer] for part in patterns if part is not None]
        if rotates and window is not None and layer_type in kept and any(p.sees_beyond(window) for p in seen):
            wider.setdefault(layer_type, []).append(layer)
    return [
        f"{len(layers)} layer(s) of type {layer_type}, the first of them layer {layers[0]}, see beyond their own "
        f"window of {config.sliding_window} tokens, but keep their rope, {kept[layer_type]['rope_type']}: a rope goes "
        f"to the layers of type full_attention alone, unless it names layer types "
        f"(--rope {layer_type}.rope_type=... --rope {layer_type}.factor=..., each type's by its name)"
        for layer_type, layers in wider.items()
    ]


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
