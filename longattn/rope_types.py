"""The frequency tables of each rope type; changes when a type is added or its formula is found wrong.

Notation: d the rotary dim, b `rope_theta`, s `factor`, L the original length in tokens, i = 0 ... d/2 - 1,
omega_i = b^(-2i/d) radians a token. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.rope_keys import RopeValues


@dataclass(frozen=True)
class RopeRequest:
    """What a frequency table is made for; lengths in tokens."""

    values: RopeValues
    head_dim: int
    rotary_dim: int
    max_position_embeddings: int | None
    seq_len: int | None

    def original_length(self) -> float:
        """L; as in transformers, the model's present length where the parameters keep none."""
        fallback = self.max_position_embeddings
        return self.values.number("original_max_position_embeddings", fallback, above=1.0)

    def length_factor(self) -> float:
        """s; as in transformers, the ratio of the present to the original length where the parameters keep none."""
        if "factor" in self.values or self.max_position_embeddings is None:
            return self.values.factor()
        return max(1.0, self.max_position_embeddings / self.original_length())


def default_inv_freq(theta: float, rotary_dim: int) -> Tensor:
    """omega_i = b^(-2i/d), shape (d/2,), radians a token.

    Raises:
        ArithmeticError: float64 can't hold the largest; found by Python's numbers, as compiled code reads no tensor.
    """
    if theta < 1.0 and not math.isfinite(theta ** (2.0 / rotary_dim - 1.0)):
        raise OverflowError
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim  # (d/2,)
    return torch.pow(theta, -exponents)


def ntk_theta(values: RopeValues, factor: float, rotary_dim: int) -> float:
    """b * s^(d/(d-2)): the base at which the longest wavelength grows s times and the shortest not at all."""
    if rotary_dim <= 2:
        raise ValueError(
            f"{values.caller}: rope_type '{values.rope_type}' needs a rotary dim above 2, got {rotary_dim}"
        )
    return values.theta() * factor ** (rotary_dim / (rotary_dim - 2))


def _default(request: RopeRequest) -> tuple[Tensor, float]:
    return default_inv_freq(request.values.theta(), request.rotary_dim), 1.0


def _linear(request: RopeRequest) -> tuple[Tensor, float]:
    return default_inv_freq(request.values.theta(), request.rotary_dim) / request.values.factor(), 1.0


def _ntk(request: RopeRequest) -> tuple[Tensor, float]:
    theta = ntk_theta(request.values, request.values.factor(), request.rotary_dim)
    return default_inv_freq(theta, request.rotary_dim), 1.0


def _dynamic(request: RopeRequest) -> tuple[Tensor, float]:
    values, length, seq_len = request.values, request.max_position_embeddings, request.seq_len
    if "alpha" in values:  # Hunyuan's checkpoints: a fixed stretch that the length plays no part in
        stretch = values.number("alpha", above=0.0)
    else:
        factor = values.factor()
        if seq_len is None:
            stretch = 1.0
        elif length is None:
            raise ValueError(
                f"{values.caller}: rope_type 'dynamic' needs max_position_embeddings, the length its formula starts "
                "from, when seq_len is given"
            )
        else:
            stretch = factor * max(seq_len, length) / length - (factor - 1.0)
    return default_inv_freq(ntk_theta(values, stretch, request.rotary_dim), request.rotary_dim), 1.0


def _yarn(request: RopeRequest) -> tuple[Tensor, float]:
    scaling = _yarn_attention_scaling(request.values, request.length_factor())
    return _by_parts_inv_freq(request), scaling


def _by_parts(request: RopeRequest) -> tuple[Tensor, float]:
    request.values.refuse_temperature()
    return _by_parts_inv_freq(request), 1.0


def _by_parts_inv_freq(request: RopeRequest) -> Tensor:
    """Frequencies that turn more than beta_fast times within L stay, those below beta_slow are divided by s."""
    values, rotary_dim = request.values, request.rotary_dim
    theta, factor, length = values.theta(), request.length_factor(), request.original_length()
    beta_fast = values.number("beta_fast", 32.0, above=0.0)
    beta_slow = values.number("beta_slow", 1.0, above=0.0)
    if beta_fast <= beta_slow:
        raise ValueError(
            f"{values.caller}: rope_parameters['beta_fast'] must be above beta_slow {beta_slow:g}, got {beta_fast:g}"
        )

    def index_of(turns: float) -> float:
        return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_of(beta_fast), index_of(beta_slow)
    if values.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if high <= low:  # a step in place of the ramp; the clamps can even swap the ends
        high = low + 0.001
    index = torch.arange(rotary_dim // 2, dtype=torch.float64)  # (d/2,)
    ramp = ((index - low) / (high - low)).clamp(0.0, 1.0)  # 0 keeps the frequency, 1 divides it by s
    return default_inv_freq(theta, rotary_dim) * ((1.0 - ramp) + ramp / factor)


def _yarn_attention_scaling(values: RopeValues, factor: float) -> float:
    if "attention_factor" in values:
        return values.number("attention_factor", above=0.0)

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all_dim = values.number("mscale", 0.0), values.number("mscale_all_dim", 0.0)
    # transformers heeds the two only together; DeepSeek's checkpoints set both.
    return temperature(mscale) / temperature(mscale_all_dim) if mscale and mscale_all_dim else temperature(1.0)


def _longrope(request: RopeRequest) -> tuple[Tensor, float]:
    values, length = request.values, request.original_length()
    is_long = request.seq_len is not None and request.seq_len > length
    divisors = {key: values.numbers(key, request.rotary_dim // 2) for key in ("short_factor", "long_factor")}
    chosen = divisors["long_factor" if is_long else "short_factor"]
    if not math.isfinite(1.0 / min(chosen)):
        raise OverflowError
    inv_freq = default_inv_freq(values.theta(), request.rotary_dim) / torch.tensor(chosen, dtype=torch.float64)
    mscale_key = "long_mscale" if is_long else "short_mscale"  # PhiMoE's checkpoints
    if mscale_key in values:
        return inv_freq, values.number(mscale_key, above=0.0)
    if "attention_factor" in values:
        return inv_freq, values.number("attention_factor", above=0.0)
    factor = request.length_factor()
    return inv_freq, math.sqrt(1.0 + math.log(factor) / math.log(length)) if factor > 1.0 else 1.0


def _llama3(request: RopeRequest) -> tuple[Tensor, float]:
    values, length = request.values, request.original_length()
    factor = values.factor()
    low = values.number("low_freq_factor", above=0.0)
    high = values.number("high_freq_factor", above=0.0)
    if high <= low:
        raise ValueError(
            f"{values.caller}: rope_parameters['high_freq_factor'] must be above low_freq_factor {low:g}, got {high:g}"
        )
    inv_freq = default_inv_freq(values.theta(), request.rotary_dim)
    turns = length * inv_freq / (2 * math.pi)  # (d/2,), full turns within L
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return inv_freq * ((1.0 - smooth) / factor + smooth), 1.0


def _proportional(request: RopeRequest) -> tuple[Tensor, float]:
    values, head_dim = request.values, request.head_dim
    rotated = int(values.number("partial_rotary_factor", 1.0) * head_dim // 2)
    inv_freq = default_inv_freq(values.theta(), head_dim) / values.number("factor", 1.0, at_least=1.0)
    inv_freq[rotated:] = 0.0  # these channels keep their place in the pairing and do not turn
    return inv_freq, 1.0


FREQUENCY_TABLES: dict[str, Callable[[RopeRequest], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "by-parts": _by_parts,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
