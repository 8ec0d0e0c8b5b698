"""A model's structure, layer by layer, and what it costs at a length, read from its config alone."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from longattn.checkpoint_source import load_config
from longattn.costs import (
    GATED_MLP_TENSORS,
    PLAIN_MLP_TENSORS,
    AttentionLayer,
    Decoder,
    activation_bytes,
    decode_flops,
    kv_cache_bytes,
    prefill_flops,
    stock_mask_bytes,
)
from longattn.plan import Plan
from longattn.rope import rope_frequencies, rope_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The rope type and wavelengths of a layer that does not rotate.
NO_ROPE = ("none", (math.inf, math.inf))

__all__ = ["Costs", "LayerStructure", "Structure", "decoder_of", "inspect_checkpoint", "models_of", "structure_of"]


@dataclass(frozen=True)
class LayerStructure:
    """One layer.

    Args:
        attention: its pattern when the model serves.
        train_attention: its pattern when the model trains.
        rope_type: the type of its rotary embedding; "none" where it has none.
        wavelengths: shortest and longest wavelength in tokens, at the length that is looked at; infinite where channels
            don't turn.
        heads: query heads.
        kv_heads: key-value heads.
        head_dim: channels of a head.
        cached_tokens: tokens that a cache has to hold after a text of the length that is looked at.
    """

    attention: str
    train_attention: str
    rope_type: str
    wavelengths: tuple[float, float]
    heads: int
    kv_heads: int
    head_dim: int
    cached_tokens: int


@dataclass(frozen=True)
class Costs:
    """What one text costs.

    Args:
        kv_cache_bytes: the cache after the text.
        prefill_flops: attention over the text.
        decode_flops: attention for its last token.
        activation_bytes: kept by one training step.
        checkpointed_bytes: the same with gradient checkpointing.
        stock_mask_bytes: the mask of stock attention, where a layer has a window and longattn doesn't serve it.
    """

    kv_cache_bytes: int
    prefill_flops: float
    decode_flops: float
    activation_bytes: int
    checkpointed_bytes: int
    stock_mask_bytes: int


@dataclass(frozen=True)
class Structure:
    """A model's structure and costs at `context` tokens; `max_position_embeddings` is the length it claims to serve."""

    model_type: str
    max_position_embeddings: int
    context: int
    layers: list[LayerStructure]
    costs: Costs

    def to_dict(self) -> dict[str, Any]:
        """Give the structure as a JSON-able dict; an infinite wavelength is None."""
        output = asdict(self)
        for layer in output["layers"]:
            layer["wavelengths"] = [length if math.isfinite(length) else None for length in layer["wavelengths"]]
        return output


def inspect_checkpoint(
    src: str | os.PathLike[str], *, context: int | None = None, plan: Plan | None = None
) -> tuple[Structure, Structure | None]:
    """Read a checkpoint's structure before and after a plan; its weights are not touched.

    Args:
        src: a checkpoint's folder, or the id of a model on the Hub.
        context: the length to look at, in tokens; by default the longest that the two serve.
        plan: what would be changed, but for its tokens. By default, what was changed if the checkpoint carries a plan.

    Returns:
        The structure before, and after; after is None where there is neither a plan nor one that was carried out.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: its family is not served, or as `longattn.extend`.

    Example:
        >>> before, after = inspect_checkpoint("Llama-2-7b", context=32768, plan=longattn.Plan(attention="window:4096"))
        >>> after.costs.prefill_flops < before.costs.prefill_flops
        True
    """
    models = models_of(src, plan)
    length = max(model.config.max_position_embeddings for model in models) if context is None else context
    structures = [structure_of(model.config, length) for model in models]
    return structures[0], structures[1] if len(structures) == 2 else None


def models_of(src: str | os.PathLike[str], plan: Plan | None = None) -> list[Any]:
    """The model before and, where there is one, after, on the meta device; arguments as for `inspect_checkpoint`."""
    from longattn.hf.families import family_of
    from longattn.surgery import extend, restore

    config = load_config(src, "inspect")
    family_of(config, "inspect")  # before anything is read that only served families have, such as a length
    model = _model_of(config)
    changed = model
    if plan is not None:
        structural = None if plan.tokens is None else {**plan.to_dict(), "tokens": None}
        if structural is not None and not any(value is not None for value in structural.values()):
            raise ValueError("inspect: the plan changes no structure, only tokens")
        changed = _model_of(model.config)
        extend(changed, None, plan if structural is None else Plan.from_dict(structural))
    elif getattr(model.config, "longattn", None):
        model = _model_of(model.config)
        restore(model)
    return [model] + ([] if changed is model else [changed])


def _model_of(config: PreTrainedConfig) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)


def structure_of(config: PreTrainedConfig, context: int) -> Structure:
    """Describe what a config stands for, and compute its costs.

    Args:
        config: of a served family, extended or not.
        context: the length to look at, in tokens.

    Raises:
        TypeError: `context` is no int.
        ValueError: the family is not served, or `context` is below 1.
    """
    from longattn.hf.families import family_of
    from longattn.hf.record import layer_patterns

    if isinstance(context, bool) or not isinstance(context, int):
        raise TypeError(f"inspect: context must be an int, a number of tokens, got {context!r}")
    if context < 1:
        raise ValueError(f"inspect: context must be at least 1 token, got {context}")
    family = family_of(config, "inspect")
    decoder, training = decoder_of(config), decoder_of(config, training=True)
    head_dim = decoder.layers[0].head_dim
    ropes = [
        _layer_rope(config, layer, head_dim, context) if rotates else NO_ROPE
        for layer, rotates in enumerate(family.rotating_layers(config))
    ]
    layers = [
        LayerStructure(
            attention=str(shape.pattern),
            train_attention=str(train.pattern),
            rope_type=rope_type,
            wavelengths=wavelengths,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=head_dim,
            cached_tokens=shape.pattern.cached_tokens(context),
        )
        for shape, train, (rope_type, wavelengths) in zip(decoder.layers, training.layers, ropes, strict=True)
    ]
    stock = layer_patterns(config) is None
    return Structure(
        config.model_type, config.max_position_embeddings, context, layers, _costs(decoder, context, stock)
    )


def decoder_of(config: PreTrainedConfig, *, training: bool = False) -> Decoder:
    """The sizes of a config's model, with the patterns that it serves by, or trains by."""
    from longattn.hf.families import family_of, kv_heads_of
    from longattn.hf.record import layer_patterns
    from longattn.hf.rope import head_dim_of

    family = family_of(config, "inspect")
    patterns = layer_patterns(config, "train_attention" if training else "attention") or family.patterns_of(config)
    shape = config.num_attention_heads, kv_heads_of(config), head_dim_of(config)
    return Decoder(
        tuple(AttentionLayer(pattern, *shape) for pattern in patterns),
        config.hidden_size,
        _mlp_channels(config),
        config.vocab_size,
        getattr(config.dtype, "itemsize", 4),
        mlp_tensors=GATED_MLP_TENSORS if family.gated_mlp else PLAIN_MLP_TENSORS,
    )


def _mlp_channels(config: PreTrainedConfig) -> int:
    """Channels inside the MLP of a layer; with experts those of all that a token goes through."""
    experts = getattr(config, "num_experts_per_tok", None)
    if experts is None:
        return config.intermediate_size
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return experts * width + (getattr(config, "shared_expert_intermediate_size", None) or 0)


def _costs(decoder: Decoder, context: int, stock: bool) -> Costs:
    return Costs(
        kv_cache_bytes=kv_cache_bytes(decoder.layers, context, decoder.dtype_bytes),
        prefill_flops=prefill_flops(decoder.layers, context),
        decode_flops=decode_flops(decoder.layers, context),
        activation_bytes=activation_bytes(decoder, context),
        checkpointed_bytes=activation_bytes(decoder, context, checkpointing=True),
        stock_mask_bytes=stock_mask_bytes(decoder.layers, context) if stock else 0,
    )


def _layer_rope(config: PreTrainedConfig, layer: int, head_dim: int, context: int) -> tuple[str, tuple[float, float]]:
    """The type of a layer's rotary embedding, and its shortest and longest wavelength in tokens at a length."""
    tables = rope_layers(config.rope_parameters)
    parameters = tables[None] if None in tables else tables[config.layer_types[layer]]
    inv_freq, _ = rope_frequencies(
        parameters, head_dim, max_position_embeddings=config.max_position_embeddings, seq_len=context
    )
    shortest, longest = float(inv_freq.max()), float(inv_freq.min())
    return parameters.get("rope_type", "default"), (
        2 * math.pi / shortest,
        2 * math.pi / longest if longest > 0 else math.inf,
    )
