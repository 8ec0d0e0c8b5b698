"""Rotary frequencies and phases, the public functions; changes when what they promise changes.

The formulas of each rope type are in `rope_types.py`, reading and checking their parameters in `rope_keys.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longattn.ops.rope_phases import exact_cos_sin
from longattn.pattern import MAX_TOKENS
from longattn.rope_keys import KNOWN_KEYS, SCALING_KEYS, RopeValues, flat_parameters, is_nested, rope_keys
from longattn.rope_types import FREQUENCY_TABLES, RopeRequest, ntk_theta

__all__ = ["SAVED_TYPES", "rope_cos_sin", "rope_frequencies", "rope_keys", "rope_layers", "stock_parameters"]

SAVED_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
"""The rope types that transformers knows, and so the only ones that a checkpoint is saved with."""


def rope_frequencies(
    rope_parameters: Mapping[str, Any],
    head_dim: int,
    *,
    max_position_embeddings: int | None = None,
    seq_len: int | None = None,
) -> tuple[Tensor, float]:
    """Compute the rotary frequencies that rotary parameters stand for.

    With d the rotary dim, b `rope_theta`, s `factor`, L `original_max_position_embeddings` and
    `omega_i = b^(-2i/d)`, i = 0 ... d/2 - 1, the frequencies of each `rope_type` are::

        default       omega_i
        linear        omega_i / s                                      (position interpolation)
        ntk           omega_i at b' = b * s^(d/(d-2))                  (static NTK-aware)
        dynamic       omega_i at b' = b * (s*n/L - s + 1)^(d/(d-2)),   n = max(seq_len, L),
                      L = max_position_embeddings, or b' = b * alpha^(d/(d-2)) where `alpha` is given
        by-parts      (1 - g_i) * omega_i + g_i * omega_i / s,         g_i a ramp from 0 to 1 between the
                      indices that turn beta_fast (32) and beta_slow (1) times within L
        yarn          by-parts, and cos and sin are scaled by 0.1 ln s + 1, or `attention_factor`,
                      or (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1)
        longrope      omega_i / e_i, e = long_factor if seq_len > L else short_factor; cos and sin are
                      scaled by sqrt(1 + ln s / ln L) or `attention_factor`
        llama3        omega_i above high_freq_factor turns within L, omega_i / s below low_freq_factor,
                      a blend that is linear in omega_i between
        proportional  b^(-2i/head_dim) / s for the first int(p * head_dim / 2), 0 for the others

    In code that `torch.compile` captures, lengths may vary, and `rope_parameters` has to hold constants.

    Args:
        rope_parameters: transformers' own dict: v5 `rope_parameters`, or v4 keys, `{"rope_scaling": {...} or
            None, "rope_theta": ...}` as well as the two merged. One layer type's; where a model has one dict
            per layer type (whose head dims can differ), `rope_layers` lists them. Keys of other rope types are
            ignored, unknown ones refused.
        head_dim: channels of a head; `partial_rotary_factor` p makes the rotary dim d = int(p * head_dim).
        max_position_embeddings: the model's present length in tokens, which "dynamic" starts from, and which
            stands in for `original_max_position_embeddings` and gives s (its ratio to L) where these are absent.
        seq_len: tokens that the frequencies are to serve, for "dynamic" and "longrope"; None means at most the
            original length: no stretch, and the short list.

    Returns:
        inv_freq, float64 (d/2,), radians a token, on the CPU; and the factor that multiplies cos and sin.

    Raises:
        ValueError: a value is missing, out of range, or of the wrong length; a type or key is unknown; the dict
            is nested by layer type; float64 can't hold the frequencies.
        TypeError: an argument has the wrong type.

    Reference:
        Su et al., 2021, RoFormer, arXiv:2104.09864; Chen et al., 2023, Position Interpolation, arXiv:2306.15595;
        Peng et al., 2023, YaRN (with NTK-aware, dynamic and by-parts), arXiv:2309.00071; Ding et al., 2024,
        LongRoPE, arXiv:2402.13753; Grattafiori et al., 2024, The Llama 3 Herd of Models, arXiv:2407.21783.

    Example:
        >>> inv_freq, scaling = rope_frequencies({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 8)
        >>> inv_freq
        tensor([0.2500, 0.0250, 0.0025, 0.0003], dtype=torch.float64)
        >>> scaling
        1.0
    """
    caller = "rope_frequencies"
    values = RopeValues(caller, flat_parameters(caller, rope_parameters))
    for name, length in (("max_position_embeddings", max_position_embeddings), ("seq_len", seq_len)):
        if length is not None and (isinstance(length, bool) or not isinstance(length, int)):
            raise TypeError(f"{caller}: {name} must be an int or None, got {type(length).__name__}")
        if length is not None and length < 1:
            raise ValueError(f"{caller}: {name} must be at least 1, got {length}")
        if length is not None and length > MAX_TOKENS:
            raise ValueError(f"{caller}: {name} must be at most 10^15, got {length}")
    rotary_dim = values.rotary_dim(head_dim)
    request = RopeRequest(values, head_dim, rotary_dim, max_position_embeddings, seq_len)
    try:
        inv_freq, scaling = FREQUENCY_TABLES[values.rope_type](request)
    except ArithmeticError:
        scaling = math.inf
    if not 0 < scaling < math.inf:
        raise ValueError(
            f"{caller}: rope_parameters must give finite frequencies and a positive factor of cos and sin, got "
            f"{dict(values.parameters)}"
        )
    return inv_freq, scaling


def rope_cos_sin(
    positions: Tensor, inv_freq: Tensor, attention_scaling: float = 1.0, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines that rotate positions, with exact phases.

    `cos(position * inv_freq) * attention_scaling`, and the same with sin; product, function and scaling are
    float64 and rounded once, so that at position 10,000,000 the result is still right to float32.

    Args:
        positions: token positions, integer or floating point, any shape (`(S,)`, `(B, S)`, `(3, B, S)`).
        inv_freq: frequencies, radians a token, floating point (rotary_dim / 2,), best float64, on the device of
            `positions`.
        attention_scaling: what multiplies both, from `rope_frequencies`.
        dtype: floating point type of the result.

    Returns:
        cos and sin, each `(*positions.shape, rotary_dim / 2)` in `dtype`.

    Raises:
        TypeError: positions are neither integer nor floating point, inv_freq or dtype not floating point, or
            attention_scaling no number.
        ValueError: inv_freq is not one-dimensional or on another device, or attention_scaling not finite.

    Reference:
        Su et al., 2021, RoFormer, arXiv:2104.09864.

    Example:
        >>> inv_freq, scaling = rope_frequencies({"rope_theta": 1e4}, 4)
        >>> cos, sin = rope_cos_sin(torch.arange(3), inv_freq, scaling)
        >>> cos
        tensor([[ 1.0000,  1.0000],
                [ 0.5403,  0.9999],
                [-0.4161,  0.9998]])
    """
    for name, tensor in (("positions", positions), ("inv_freq", inv_freq)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"rope_cos_sin: {name} must be a tensor, got {type(tensor).__name__}")
    if positions.dtype == torch.bool or positions.is_complex():
        raise TypeError(f"rope_cos_sin: positions must be integer or floating point, got {positions.dtype}")
    if not inv_freq.is_floating_point():
        raise TypeError(f"rope_cos_sin: inv_freq must be floating point, got {inv_freq.dtype}")
    if inv_freq.dim() != 1:
        raise ValueError(f"rope_cos_sin: inv_freq must have shape (rotary_dim / 2,), got {tuple(inv_freq.shape)}")
    if inv_freq.device != positions.device:
        raise ValueError(
            f"rope_cos_sin: inv_freq must be on the device of positions, {positions.device}, got {inv_freq.device}"
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"rope_cos_sin: dtype must be floating point, got {dtype}")
    if isinstance(attention_scaling, bool) or not isinstance(attention_scaling, int | float | torch.SymFloat):
        raise TypeError(f"rope_cos_sin: attention_scaling must be a number, got {attention_scaling!r}")
    # an int may be finite and still be no float; compiled, a float's other bounds would cost an empty graph
    limit = sys.float_info.max if isinstance(attention_scaling, int) else math.inf
    if not (abs(attention_scaling) < math.inf and abs(attention_scaling) <= limit):
        raise ValueError(f"rope_cos_sin: attention_scaling must be finite, got {attention_scaling!r}")
    return exact_cos_sin(positions, inv_freq, attention_scaling, dtype)


def rope_layers(rope_parameters: Mapping[str, Any]) -> dict[str | None, dict[str, Any]]:
    """List the rotary parameters of each layer type.

    Args:
        rope_parameters: transformers' dict, flat or one dict per layer type (None for a type without rope).

    Returns:
        `{layer_type: parameters}` of the types that have rope, or `{None: parameters}` for a flat dict; copies.
        Plain values that older checkpoints keep beside the nested dicts are left out, as transformers does.

    Raises:
        ValueError: the value of a layer type is neither a dict nor None.
        TypeError: rope_parameters is not a dict.

    Example:
        >>> nested = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
        >>> [(layer, rope_frequencies(rope, 8)[0].numel()) for layer, rope in rope_layers(nested).items()]
        [('full_attention', 4), ('sliding_attention', 4)]
    """
    if not isinstance(rope_parameters, Mapping):
        raise TypeError(f"rope_layers: rope_parameters must be a dict, got {type(rope_parameters).__name__}")
    if not is_nested(rope_parameters):
        return {None: dict(rope_parameters)}
    layers = {key: value for key, value in rope_parameters.items() if key not in KNOWN_KEYS and value is not None}
    for layer_type, parameters in layers.items():
        if not isinstance(parameters, Mapping):
            raise ValueError(f"rope_layers: rope_parameters['{layer_type}'] must be a dict or None, got {parameters!r}")
    return {layer_type: dict(parameters) for layer_type, parameters in layers.items()}


def stock_parameters(rope_parameters: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Express rotary parameters in the types that transformers knows, with the same frequencies bit for bit.

    "ntk" becomes "default" with `rope_theta * factor^(d/(d-2))`, d the rotary dim; "by-parts" becomes "yarn" with
    `attention_factor` 1.0; other types are returned as they are.

    Args:
        rope_parameters: as in `rope_frequencies`, or one such dict per layer type.
        head_dim: channels of a head.

    Returns:
        A new dict, nested where the given one is, whose types are all in `SAVED_TYPES`.

    Raises:
        ValueError: a value that the conversion needs is missing or out of range, or a type or key is unknown.

    Reference:
        Peng et al., 2023, YaRN, arXiv:2309.00071, sections 3.1 and 3.2.

    Example:
        >>> stock_parameters({"rope_type": "by-parts", "factor": 4.0, "rope_theta": 1e4}, 64)
        {'rope_type': 'yarn', 'factor': 4.0, 'rope_theta': 10000.0, 'attention_factor': 1.0}
    """
    caller = "stock_parameters"
    if isinstance(rope_parameters, Mapping) and is_nested(rope_parameters):
        layers = rope_layers(rope_parameters)
        stock = {layer_type: stock_parameters(parameters, head_dim) for layer_type, parameters in layers.items()}
        return {key: stock.get(key, value) for key, value in rope_parameters.items()}
    parameters = flat_parameters(caller, rope_parameters)
    values = RopeValues(caller, parameters)
    if values.rope_type == "ntk":
        theta = ntk_theta(values, values.factor(), values.rotary_dim(head_dim))
        kept = {key: value for key, value in parameters.items() if key not in SCALING_KEYS}
        return {**kept, "rope_type": "default", "rope_theta": theta}
    if values.rope_type == "by-parts":
        values.refuse_temperature()
        return {**parameters, "rope_type": "yarn", "attention_factor": 1.0}
    return dict(rope_parameters)
