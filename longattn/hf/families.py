"""Which model families are served, what longattn has to know of each, and why the others are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig

from longattn.hf.record import layer_patterns
from longattn.pattern import Pattern

__all__ = [
    "FAMILIES",
    "Family",
    "attention_modules",
    "config_of",
    "family_of",
    "kv_heads_of",
    "layer_of",
    "refusal_of",
    "serving_patterns",
]

WINDOWED = "sliding_attention"
SERVED_LAYERS = frozenset({"full_attention", WINDOWED})


@dataclass(frozen=True)
class Family:
    """One architecture of transformers that `longattn.extend` serves.

    Args:
        model_type: `config.model_type`.
        windows: where the sliding windows of the layers are kept: "none" has none, "shared" has one for all layers
            (`sliding_window`), "layered" has one for the layers that `layer_types` names.
        interleaved: whether rotary pairs are neighbours (channels 0 and 1, 2 and 3, ...) and not halves apart.
        rotates: which layers rotate queries and keys: "all", only those with a window of their own ("windowed"), or
            those that `no_rope_layers` marks with 1 ("listed").
        rope_types: those that the family's config accepts; empty where it accepts all.
        gated_mlp: whether the MLP has a gate, a product of two projections.
    """

    model_type: str
    windows: Literal["none", "shared", "layered"]
    interleaved: bool = False
    rotates: Literal["all", "windowed", "listed"] = "all"
    rope_types: tuple[str, ...] = ()
    gated_mlp: bool = True

    def check(self, config: PreTrainedConfig, caller: str) -> None:
        """Refuse a config that says what models of this family do not do; the error starts with the caller's name."""
        if self.windows == "none" and getattr(config, "sliding_window", None) is not None:
            raise ValueError(
                f"{caller}: a {self.model_type} has no sliding windows, got sliding_window {config.sliding_window}: "
                "its cache would forget keys that its mask shows"
            )
        layer_types = getattr(config, "layer_types", None)
        if self.windows != "layered" and layer_types is not None:
            raise ValueError(
                f"{caller}: a {self.model_type} has one kind of layer, got layer_types {layer_types}; load the "
                "checkpoint as the architecture that reads them"
            )
        if not set(layer_types or ()) <= SERVED_LAYERS:
            raise ValueError(
                f"{caller}: layer_types must be full_attention or sliding_attention, got "
                f"{sorted(set(layer_types or ()))}"
            )
        two_way = getattr(config, "use_bidirectional_attention", None)
        if two_way or not getattr(config, "is_causal", True):
            field = "use_bidirectional_attention True" if two_way else "is_causal False"
            raise ValueError(f"{caller}: only causal decoders are served, got a config with {field}")

    def check_rope(self, rope_types: set[str]) -> None:
        """Refuse rope types that transformers would not load in this family."""
        others = sorted(rope_types - set(self.rope_types)) if self.rope_types else []
        if others:
            raise ValueError(
                f"extend: a {self.model_type} config only takes the rope types {', '.join(self.rope_types)} (ntk is "
                f"saved as default), got {others[0]!r}"
            )

    def windows_of(self, config: PreTrainedConfig) -> list[int | None]:
        """Tokens in each layer's sliding window, the query's own included; None where a layer sees all."""
        layers = config.num_hidden_layers
        if self.windows == "none":
            return [None] * layers
        if self.windows == "shared":
            return [config.sliding_window] * layers
        return [config.sliding_window if kind == WINDOWED else None for kind in config.layer_types]

    def patterns_of(self, config: PreTrainedConfig) -> list[Pattern]:
        """Each layer's own pattern, as transformers' stock attention gives it."""
        return [Pattern("full") if size is None else Pattern("window", size) for size in self.windows_of(config)]

    def rotating_layers(self, config: PreTrainedConfig) -> list[bool]:
        """Which layers rotate queries and keys; whatever a plan makes of their patterns, that stays."""
        if self.rotates == "windowed":
            return [size is not None for size in self.windows_of(config)]
        if self.rotates == "listed":
            return [bool(flag) for flag in config.no_rope_layers]
        return [True] * config.num_hidden_layers


FAMILIES = {
    family.model_type: family
    for family in (
        Family("arcee", "none", gated_mlp=False),
        Family("cohere", "none", interleaved=True),
        Family("cohere2", "layered", interleaved=True, rotates="windowed"),
        Family("cwm", "layered"),
        Family("ernie4_5", "none", interleaved=True),
        Family("gemma", "none"),
        Family("gemma2", "layered"),
        Family("gemma3_text", "layered"),
        Family("glm", "none", interleaved=True),
        Family("glm4", "none", interleaved=True),
        Family("gpt_neox", "none", gated_mlp=False),
        Family("gpt_oss", "layered"),
        Family("granite", "none"),
        Family("granitemoe", "none"),
        Family("helium", "none", interleaved=True),
        Family("llama", "none"),
        Family("ministral", "layered"),
        Family("mistral", "shared"),
        Family("mixtral", "shared"),
        Family("olmo", "none"),
        Family("olmo2", "none"),
        Family("olmo3", "layered"),
        Family("olmoe", "none"),
        Family("phi", "none", gated_mlp=False),
        Family("phi3", "shared", rope_types=("default", "longrope")),
        Family("qwen2", "layered"),
        Family("qwen2_moe", "layered"),
        Family("qwen3", "layered"),
        Family("qwen3_moe", "shared"),
        Family("seed_oss", "none"),
        Family("smollm3", "layered", rotates="listed"),
        Family("stablelm", "none"),
        Family("starcoder2", "shared", gated_mlp=False),
    )
}


def family_of(config: PreTrainedConfig, caller: str) -> Family:
    """Look up the family of a config.

    Args:
        config: of any model, whatever it lacks.
        caller: the name that the error starts with.

    Raises:
        ValueError: the family is not served; says which, why, and which are.
    """
    family = FAMILIES.get(config.model_type)
    if family is not None:
        return family
    raise ValueError(
        f"{caller}: model_type {config.model_type!r} is not served: {refusal_of(config)}; served are "
        f"{', '.join(sorted(FAMILIES))}"
    )


def serving_patterns(config: PreTrainedConfig, caller: str) -> list[Pattern]:
    """Each layer's pattern as a plan has set it, else the model's own.

    Args:
        config: of any model.
        caller: the name that the error starts with.

    Raises:
        ValueError: there is no plan, and the family is not served.
    """
    recorded = layer_patterns(config)
    if recorded is not None:
        return recorded
    family = family_of(config, caller)
    family.check(config, caller)
    return family.patterns_of(config)


# Architectures whose attention transformers' AttentionInterface does not reach.
NOT_HOOKED = frozenset(
    "big_bird bloom clvp cpmant falcon falcon_mamba gpt_neo gpt_neox_japanese mamba mamba2 megatron-bert mpt "
    "openai-gpt reformer rembert roformer rwkv trocr xglm xlm xlnet xlstm".split()
)
NOT_SERVED = {
    "its keys are compressed (MLA), and one rotated part of them is shared by all heads": (
        "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear "
        "longcat_flash minicpm3 youtu"
    ),
    "its keys are compressed over several tokens": "deepseek_v4",
    "a layer attends twice and takes the difference": "diffllama",
    "its last layers attend to the keys of earlier ones, which their patterns would have to share": (
        "gemma3n_text gemma4_text gemma4_unified_text"
    ),
    "its rotary embedding turns complex numbers, and its queries are scaled by their position": "llama4_text",
    "its queries are scaled by their position": "ministral3 mistral_large4",
    "its layers have rotary bases of their own": "granite_swa granitemoe_swa",
    "its rotary embedding turns the other way round": "nanochat",
}
REASONS = {name: reason for reason, names in NOT_SERVED.items() for name in names.split()}


def refusal_of(config: PreTrainedConfig) -> str:
    """Why a config's family is not served."""
    layer_types = set(getattr(config, "layer_types", None) or ()) - SERVED_LAYERS
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if config.sub_configs:
        return (
            f"it is made of several models ({', '.join(sorted(config.sub_configs))}), and a decoder of text alone is "
            "needed, such as gemma3_text beside gemma3"
        )
    if config.model_type in NOT_HOOKED:
        return "its attention does not go through transformers' AttentionInterface"
    if config.model_type in REASONS:
        return REASONS[config.model_type]
    if layer_types:
        return f"it has layers that keep no keys of each token, or not those alone ({', '.join(sorted(layer_types))})"
    if not getattr(config, "rope_parameters", None):
        return "it has no rotary embedding that is built from its config"
    return "it is not among those that were compared with transformers' own attention"


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a decoder, by layer."""
    return sorted(_attention_modules(model), key=layer_of)


def _attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal") and hasattr(module, "scaling"):
            yield module


def layer_of(attention: nn.Module) -> int:
    """The layer that an attention module belongs to."""
    return attention.layer_idx  # type: ignore[return-value]


def config_of(attention: nn.Module) -> PreTrainedConfig:
    """The config that an attention module reads at each call."""
    return attention.config  # type: ignore[return-value]


def kv_heads_of(config: PreTrainedConfig) -> int:
    """Key-value heads of a layer; configs that don't name them have one for each query head."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
