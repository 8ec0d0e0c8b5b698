"""The stock rotary modules of a model: rebuild them from the config, and show that they turn by the config's angles."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from longattn.rope import rope_frequencies, rope_layers

__all__ = [
    "check_rotary_modules",
    "head_dim_of",
    "rebuild_rotary_modules",
    "rotary_modules",
]

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
        # longrope keeps the table of its long texts in a plain attribute, built when the first long text comes
        for name in [name for name in vars(module) if name.endswith("long_inv_freq")]:
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
