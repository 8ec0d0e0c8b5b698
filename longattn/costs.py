"""What a decoder's attention costs at a length: operations and bytes; changes with a formula.

Notation: n tokens in the text, per layer Hq query heads, Hkv key-value heads of D channels, and visible(n), the
(query, key) pairs that the layer's pattern shows, averaged over the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longattn.pattern import Pattern

__all__ = [
    "GATED_MLP_TENSORS",
    "PLAIN_MLP_TENSORS",
    "AttentionLayer",
    "Decoder",
    "activation_bytes",
    "decode_flops",
    "kv_cache_bytes",
    "prefill_flops",
    "stock_mask_bytes",
]

FLOAT32_BYTES = 4
GATED_MLP_TENSORS = 4
PLAIN_MLP_TENSORS = 2


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of one layer.

    Args:
        pattern: which keys a query sees.
        heads: Hq.
        kv_heads: Hkv.
        head_dim: D, channels.
    """

    pattern: Pattern
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder.

    Args:
        layers: the attention of each layer.
        hidden_size: channels between layers.
        intermediate_size: channels inside an MLP; with experts those of all that a token goes through.
        vocab_size: logits a token.
        dtype_bytes: bytes of one number in weights and activations.
        mlp_tensors: tensors of `intermediate_size` channels that an MLP keeps, `GATED_MLP_TENSORS` (gate, activated
            gate, up, product) or `PLAIN_MLP_TENSORS` (up, activated).
    """

    layers: tuple[AttentionLayer, ...]
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    dtype_bytes: int
    mlp_tensors: int = GATED_MLP_TENSORS


def prefill_flops(layers: Sequence[AttentionLayer], num_tokens: int) -> float:
    """Floating point operations of attention over a whole text: `4 * Hq * D * visible(n)`, summed over the layers.

    Counts two products, query with key and weight with value, a multiplication and an addition a channel each; neither
    softmax nor the linear layers around.

    Args:
        layers: the attention of each layer.
        num_tokens: n.

    Returns:
        Operations for one text.

    Example:
        >>> prefill_flops([AttentionLayer(Pattern("window", 2), heads=1, kv_heads=1, head_dim=8)], 3)
        160.0
    """
    return sum(4.0 * layer.heads * layer.head_dim * layer.pattern.visible(num_tokens) for layer in layers)


def decode_flops(layers: Sequence[AttentionLayer], num_tokens: int) -> float:
    """Floating point operations of attention for the last of n tokens: `4 * Hq * D * (visible(n) - visible(n - 1))`.

    Args:
        layers: the attention of each layer.
        num_tokens: n, at least 1.

    Returns:
        Operations for one decoded token.

    Example:
        >>> decode_flops([AttentionLayer(Pattern("full"), heads=1, kv_heads=1, head_dim=8)], 100)
        3200.0
    """
    return prefill_flops(layers, num_tokens) - prefill_flops(layers, num_tokens - 1)


def kv_cache_bytes(layers: Sequence[AttentionLayer], num_tokens: int, dtype_bytes: int) -> int:
    """Bytes of the keys and values that a cache has to hold: `2 * Hkv * D * bytes * tokens`, over the layers.

    Args:
        layers: the attention of each layer.
        num_tokens: tokens of the text so far.
        dtype_bytes: bytes of one number.

    Returns:
        Bytes for one text.

    Example:
        >>> kv_cache_bytes([AttentionLayer(Pattern("full"), heads=4, kv_heads=2, head_dim=8)], 100, 2)
        6400
    """
    return sum(
        2 * layer.kv_heads * layer.head_dim * dtype_bytes * layer.pattern.cached_tokens(num_tokens) for layer in layers
    )


def stock_mask_bytes(layers: Sequence[AttentionLayer], num_tokens: int) -> int:
    """Bytes of the mask that stock attention forms for its windows, one byte a (query, key) pair: `n * n`, or 0.

    One mask serves all layers of a model. longattn forms none.

    Args:
        layers: the attention of each layer.
        num_tokens: n.

    Example:
        >>> stock_mask_bytes([AttentionLayer(Pattern("window", 8), heads=4, kv_heads=2, head_dim=8)], 1000)
        1000000
    """
    hides = any(layer.pattern.kind != "full" and layer.pattern.size < num_tokens for layer in layers)
    return num_tokens * num_tokens if hides else 0


def activation_bytes(decoder: Decoder, num_tokens: int, *, checkpointing: bool = False) -> int:
    """Bytes that one training step keeps for its backward pass, for one text, with attention that stores no scores.

    With b bytes a number, h `hidden_size` and f `intermediate_size`, a token leaves in each layer: two norms of
    `4 h + 2 b h` (float32 input; normalised; scaled), query, keys, values and output `2 b (Hq + Hkv) D`, the
    log-sum-exp `4 Hq`, and the MLP's gate, activated gate, up and product, `4 b f` (`2 b f` without a gate); at the end
    one more norm, and the log-probabilities in float32, `4 vocab_size`. Cosines and sines, `2 b D`, are shared by the
    layers. Exact for Llama; further norms of other families and the routing of experts are not counted.

    Args:
        decoder: the model's sizes.
        num_tokens: n.
        checkpointing: gradient checkpointing layer by layer: each layer keeps its input, `b h`, and one at a time is
            computed again.

    Returns:
        Bytes for one text; grows with n, whatever the pattern.

    Reference:
        Korthikanti et al., 2022, Reducing Activation Recomputation in Large Transformer Models, arXiv:2205.05198, for
        the way of counting.

    Example:
        >>> layer = AttentionLayer(Pattern("full"), heads=4, kv_heads=2, head_dim=8)
        >>> decoder = Decoder((layer,), hidden_size=32, intermediate_size=64, vocab_size=100, dtype_bytes=2)
        >>> activation_bytes(decoder, 1)
        1920
    """
    b, h = decoder.dtype_bytes, decoder.hidden_size
    norm = FLOAT32_BYTES * h + 2 * b * h
    layers = [
        2 * norm
        + 2 * b * (layer.heads + layer.kv_heads) * layer.head_dim
        + FLOAT32_BYTES * layer.heads
        + decoder.mlp_tensors * b * decoder.intermediate_size
        for layer in decoder.layers
    ]
    inside = max(layers) + b * h * len(layers) if checkpointing else sum(layers)
    tables = 2 * b * max(layer.head_dim for layer in decoder.layers)
    return num_tokens * (inside + tables + norm + FLOAT32_BYTES * decoder.vocab_size)
