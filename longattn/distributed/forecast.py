"""What a sequence over ranks will cost: bytes that each rank sends, memory, and the share of communication.

Bytes follow from the plan that ranks send by, so they are exact. Times are a model: operations over a sustained rate,
bytes over a link's, in whichever direction a rank has more of them; backward takes twice the operations of linear
layers and 2.5 times those of attention, which computes its scores again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from longattn.costs import GATED_MLP_TENSORS, AttentionLayer, Decoder, activation_bytes
from longattn.distributed.plan import head_sets, needs_of
from longattn.distributed.style import Full
from longattn.ops.band import Band, GroupBand, WindowBand

__all__ = ["Forecast", "Step", "forecast", "layer_bytes"]

OPTIMIZER_BYTES = 16  # a parameter: float32 weight, gradient, and AdamW's two moments
LINEAR_BACKWARD, ATTENTION_BACKWARD = 2.0, 2.5  # operations of a backward, over those of its forward


@dataclass(frozen=True)
class Step:
    """A forward of a text, or a training step.

    Args:
        sent_bytes: that each rank sends to others, by rank.
        compute_s: attention and linear layers on the last rank, which never has less work than others.
        communication_s: on the rank that sends or receives most.
        exposed_s: of that, what a shard's attention to its own keys does not hide.
    """

    sent_bytes: tuple[int, ...]
    compute_s: float
    communication_s: float
    exposed_s: float

    @property
    def share(self) -> float:
        """Communication in the step's time where none of it is hidden."""
        return self.communication_s / (self.communication_s + self.compute_s)

    @property
    def exposed_share(self) -> float:
        """What is not hidden in the step's time."""
        return self.exposed_s / (self.exposed_s + self.compute_s)


@dataclass(frozen=True)
class Forecast:
    """A text over ranks, on the rank that has most.

    Args:
        ranks: that hold the text.
        tokens: of the text on a rank.
        parameter_bytes: weights, gradients and AdamW's moments in float32, sharded over the ranks (FSDP2).
        activation_bytes, checkpointed_bytes: kept for a training step, without and with checkpointing.
        remote_bytes: kept of other ranks' keys and values, in all layers.
        remote_layer_bytes: the same in the layer that keeps most, the only one at a time with checkpointing.
        cache_bytes: keys and values of a rank's tokens.
        forward, training, checkpointed: a forward; a training step without and with checkpointing, which runs and sends
            the forward twice.
    """

    ranks: int
    tokens: int
    parameter_bytes: int
    activation_bytes: int
    checkpointed_bytes: int
    remote_bytes: int
    remote_layer_bytes: int
    cache_bytes: int
    forward: Step
    training: Step
    checkpointed: Step


@dataclass(frozen=True)
class _Layer:
    """A layer's forward: bytes by rank, and seconds of attention on the last rank, `own` those to its own keys."""

    sent: list[int]
    received: list[int]
    attention_s: float
    own_s: float
    link_s: float


def forecast(
    decoder: Decoder,
    num_tokens: int,
    ranks: int,
    *,
    parameters: int,
    link: float,
    flops: float,
    full: Full = "gather",
) -> Forecast:
    """Predict what a text of `num_tokens` costs each of some ranks.

    Args:
        decoder: the model's sizes; its layers' patterns are those that run.
        num_tokens: N, padded to a multiple of the ranks as by `shard_batch`.
        ranks: P.
        parameters: of the model.
        link: bytes a second that a rank sends while it receives as many.
        flops: operations a second that a rank sustains.
        full: as for `ContextParallel`.

    Raises:
        ValueError: a number is not above 0, or full="ulysses" does not fit the heads.

    Example:
        >>> from longattn.pattern import Pattern
        >>> layer = AttentionLayer(Pattern("window", 4096), heads=32, kv_heads=8, head_dim=128)
        >>> decoder = Decoder((layer,), 4096, 14336, 128256, dtype_bytes=2)
        >>> found = forecast(decoder, 2**20, 8, parameters=10**9, link=45e9, flops=4e14)
        >>> found.forward.sent_bytes[0], found.forward.sent_bytes[-1]  # 4095 keys and values; no rank follows the last
        (16773120, 0)
    """
    for name, number in (("num_tokens", num_tokens), ("ranks", ranks), ("link", link), ("flops", flops)):
        if not number > 0:
            raise ValueError(f"forecast: {name} must be above 0, got {number}")
    tokens, size = -(-num_tokens // ranks), decoder.dtype_bytes
    layers = {layer: _layer(layer, tokens, ranks, size, link, flops, full) for layer in set(decoder.layers)}
    counts = Counter(decoder.layers)
    linear_s = _linear_flops(decoder) * tokens / flops
    held = {layer: _held_bytes(layer, found, tokens, size, full) for layer, found in layers.items()}
    found = [(layers[layer], count) for layer, count in counts.items()]
    return Forecast(
        ranks=ranks,
        tokens=tokens,
        parameter_bytes=-(-OPTIMIZER_BYTES * parameters // ranks),
        activation_bytes=activation_bytes(decoder, tokens),
        checkpointed_bytes=activation_bytes(decoder, tokens, checkpointing=True),
        remote_bytes=sum(held[layer] * count for layer, count in counts.items()),
        remote_layer_bytes=max(held.values()),
        cache_bytes=sum(2 * layer.kv_heads * layer.head_dim * size * tokens for layer in decoder.layers),
        forward=_step(found, linear_s, forwards=1, backwards=0),
        training=_step(found, linear_s, forwards=1, backwards=1),
        checkpointed=_step(found, linear_s, forwards=2, backwards=1),
    )


def layer_bytes(
    layer: AttentionLayer, tokens: int, ranks: int, dtype_bytes: int, *, full: Full = "gather"
) -> tuple[list[int], list[int]]:
    """Bytes that a layer's forward sends and receives, by rank; its backward receives and sends them.

    Args:
        layer: its pattern and heads.
        tokens: of a shard.
        ranks: P.
        dtype_bytes: of one number.
        full: as for `ContextParallel`.
    """
    if layer.pattern.kind == "full" and full == "ulysses":
        if layer.kv_heads % ranks or layer.heads % ranks:
            raise ValueError(
                f"forecast: full='ulysses' needs heads that {ranks} ranks can share, got {layer.heads} and "
                f"{layer.kv_heads} kv"
            )
        each = 2 * (layer.heads + layer.kv_heads) * layer.head_dim * tokens * (ranks - 1) // ranks * dtype_bytes
        return [each] * ranks, [each] * ranks
    sent, received = [0] * ranks, [0] * ranks
    offsets = [rank * tokens for rank in range(ranks + 1)]
    shifts, bands = _bands(layer)
    for heads in head_sets(layer.heads, layer.kv_heads, shifts, bands):
        row = 2 * (heads.kv[1] - heads.kv[0]) * layer.head_dim * dtype_bytes
        for rank in range(ranks):
            for need in needs_of(heads.bands, offsets, rank, layer.pattern.sinks):
                received[rank] += row * need.tokens
                for owner in range(need.keys[0] // tokens, (need.keys[1] - 1) // tokens + 1):
                    start, stop = max(need.keys[0], owner * tokens), min(need.keys[1], (owner + 1) * tokens)
                    sent[owner] += row * (stop - start)
    return sent, received


def _bands(layer: AttentionLayer) -> tuple[list[int], dict[int, Band]]:
    """The shift of each head, and the band of each shift."""
    pattern, half = layer.pattern, layer.heads // 2
    if pattern.kind != "group":
        return [0] * layer.heads, {0: WindowBand(pattern.size - 1 if pattern.kind == "window" else -1, 0)}
    shifts = [0] * half + [pattern.shift] * (layer.heads - half)
    return shifts, {shift: GroupBand(pattern.size, shift, True) for shift in shifts}


def _layer(layer: AttentionLayer, tokens: int, ranks: int, size: int, link: float, flops: float, full: Full) -> _Layer:
    sent, received = layer_bytes(layer, tokens, ranks, size, full=full)
    pairs, own = layer.pattern.visible(ranks * tokens), layer.pattern.visible(tokens)
    if layer.pattern.kind == "full" and full == "ulysses":
        pairs, own = pairs / ranks, 0.0  # nothing is computed while heads are traded
    else:
        pairs -= layer.pattern.visible((ranks - 1) * tokens)
    second = 4.0 * layer.heads * layer.head_dim / flops  # a visible pair's
    return _Layer(sent, received, second * pairs, second * own, max(*sent, *received) / link)


def _held_bytes(layer: AttentionLayer, found: _Layer, tokens: int, size: int, full: Full) -> int:
    if layer.pattern.kind == "full" and full == "ulysses":
        return (layer.heads + 2 * layer.kv_heads) * layer.head_dim * tokens * size
    return max(found.received)


def _linear_flops(decoder: Decoder) -> float:
    """Of a token: projections, MLPs and logits; a multiplication and an addition a weight."""
    mats = 3 if decoder.mlp_tensors == GATED_MLP_TENSORS else 2
    heads = sum(2 * (layer.heads + layer.kv_heads) * layer.head_dim for layer in decoder.layers)
    mlps = mats * decoder.intermediate_size * len(decoder.layers)
    return 2.0 * decoder.hidden_size * (heads + mlps + decoder.vocab_size)


def _step(layers: list[tuple[_Layer, int]], linear_s: float, *, forwards: int, backwards: int) -> Step:
    ranks = range(len(layers[0][0].sent))
    attention = sum(count * layer.attention_s for layer, count in layers)
    exposed = sum(
        count
        * (
            forwards * max(0.0, layer.link_s - layer.own_s)
            + backwards * max(0.0, layer.link_s - ATTENTION_BACKWARD * layer.own_s)
        )
        for layer, count in layers
    )
    return Step(
        sent_bytes=tuple(
            sum(count * (forwards * layer.sent[r] + backwards * layer.received[r]) for layer, count in layers)
            for r in ranks
        ),
        compute_s=attention * (forwards + ATTENTION_BACKWARD * backwards)
        + linear_s * (forwards + LINEAR_BACKWARD * backwards),
        communication_s=sum(count * layer.link_s for layer, count in layers) * (forwards + backwards),
        exposed_s=exposed,
    )
