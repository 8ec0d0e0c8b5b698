"""Which model families are served, and where each keeps the windows of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig

from longattn.pattern import Pattern

__all__ = ["FAMILIES", "Family", "attention_modules", "config_of", "family_of", "layer_of"]


@dataclass(frozen=True)
class Family:
    """One architecture of transformers that `longattn.extend` serves.

    Args:
        model_type: `config.model_type`.
        windows: where the sliding windows of the layers are kept: "none" has none, "shared" has one for all layers
            (`sliding_window`), "layered" has one for the layers that `layer_types` names.
    """

    model_type: str
    windows: Literal["none", "shared", "layered"]

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a config that says what models of this family do not do."""
        if self.windows == "none" and getattr(config, "sliding_window", None) is not None:
            raise ValueError(
                f"extend: a {self.model_type} has no sliding windows, got sliding_window {config.sliding_window}: its "
                "cache would forget keys that its mask shows"
            )
        if self.windows != "layered" and getattr(config, "layer_types", None) is not None:
            raise ValueError(
                f"extend: a {self.model_type} has one kind of layer, got layer_types {config.layer_types}; load the "
                "checkpoint as the architecture that reads them"
            )
        if not getattr(config, "is_causal", True):
            raise ValueError("extend: only causal decoders are served, got a config with is_causal False")

    def windows_of(self, config: PreTrainedConfig) -> list[int | None]:
        """Tokens in each layer's sliding window, the query's own included; None where a layer sees all."""
        layers = config.num_hidden_layers
        if self.windows == "none":
            return [None] * layers
        if self.windows == "shared":
            return [config.sliding_window] * layers
        return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]

    def patterns_of(self, config: PreTrainedConfig) -> list[Pattern]:
        """Each layer's own pattern, as transformers' stock attention gives it."""
        return [Pattern("full") if size is None else Pattern("window", size) for size in self.windows_of(config)]


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "none"),
        Family("mistral", "shared"),
        Family("qwen2", "layered"),
    )
}

# Architectures whose attention transformers' AttentionInterface does not reach.
NOT_HOOKED = frozenset({"gptj", "codegen", "falcon", "roformer", "gpt_neox_japanese", "clvp"})


def family_of(config: PreTrainedConfig) -> Family:
    """Look up the family of a config.

    Raises:
        ValueError: the family is not served; says which, why, and which are.
    """
    family = FAMILIES.get(config.model_type)
    if family is not None:
        return family
    served = ", ".join(sorted(FAMILIES))
    if config.model_type in NOT_HOOKED:
        reason = "its attention does not go through transformers' AttentionInterface"
    elif config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    else:
        reason = "where it keeps its windows and rotary modules is not known to longattn"
    raise ValueError(f"extend: model_type {config.model_type!r} is not served: {reason}; served are {served}")


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a decoder, by layer."""
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")]
    return sorted(found, key=layer_of)


def layer_of(attention: nn.Module) -> int:
    """The layer that an attention module belongs to."""
    return attention.layer_idx  # type: ignore[return-value]


def config_of(attention: nn.Module) -> PreTrainedConfig:
    """The config that an attention module reads at each call."""
    return attention.config  # type: ignore[return-value]
