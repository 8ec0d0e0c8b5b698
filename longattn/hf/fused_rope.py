"""`use_fused_rope`: which models it can serve, swapping a model's modules whole or not at all, and undoing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longattn.hf.fused_modules import (
    STOCK_APPLY,
    ExactPhases,
    Fused,
    exact_tables,
    forward_is_its_class,
    fused_attention,
    fused_rotary,
    layer_types,
    original_length,
    prefix_of,
    rope_type_of,
    rotates_once,
    set_class,
    stock_apply,
)
from longattn.hf.rope import FREQUENCY_RTOL, head_dim_of, rotary_modules
from longattn.ops.apply_rope import apply_rope
from longattn.rope import rope_cos_sin
from longattn.wrappers import check_model

__all__ = ["FUSED_FAMILIES", "check_stock_rope_fits", "has_fused_rope", "use_fused_rope", "use_stock_rope"]

# model types whose layers use cos and sin in one call of apply_rotary_pos_emb and nowhere else
FUSED_FAMILIES = frozenset(
    ["cohere", "cohere2", "gemma2", "gemma3_text", "gpt_neox", "gpt_oss", "granite", "llama", "mistral", "olmo2"]
    + ["olmo3", "phi3", "qwen2", "qwen3"]
)
# of probed rotations by less than 8 radians; another pairing or width of the tables is off by about 1
PROBE_ATOL = 1e-4


def use_fused_rope(model: PreTrainedModel) -> PreTrainedModel:
    """Rotate the queries and keys of this model by exact phases, in one op that rounds once.

    `cos(position * inv_freq)` comes from `longattn.rope_cos_sin`, with the config's frequencies in float64, whatever
    dtype the model was cast to, and is rounded once to float32 (float64 models keep it); `longattn.apply_rope` rotates.
    Only this instance changes. Nothing of it is saved; copies and pickles of the instance keep it; `longattn.restore`
    undoes it; `longattn.extend` may come before or after. Calling it again changes nothing.

    Where frequencies depend on the text, they are those of the length that transformers' rule gives: longrope's long
    list where the largest position is beyond the original length; "dynamic" grows with the largest position seen and
    falls back below the model's length, which reads values on the host, so that full graphs break as they do in stock.

    Args:
        model: a causal decoder of a served family, in place; the model inside a wrapper may be given.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: its rotary embedding can't be swapped; says why, and nothing has changed.

    Reference:
        Su et al., 2021, RoFormer, arXiv:2104.09864.

    Example:
        >>> model = longattn.hf.use_fused_rope(model)
    """
    check_model("use_fused_rope", model)
    if has_fused_rope(model):
        return model
    for module, fused in _planned(model):
        set_class(module, fused)
        if isinstance(module, ExactPhases):
            module.set_frequencies()
    return model


def has_fused_rope(model: nn.Module) -> bool:
    """Whether `use_fused_rope` changed this model."""
    return any(isinstance(module, Fused) for module in model.modules())


def check_stock_rope_fits(function: str, model: nn.Module) -> None:
    """Refuse to undo fused rope beneath a class that was put around its own, such as FSDP2's.

    Raises:
        ValueError: names the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, Fused) and "longattn_stock" not in vars(type(module)):
            raise ValueError(
                f"{function}: {name} became a {type(module).__name__} after use_fused_rope; give a model whose modules "
                "have not been wrapped since"
            )


def use_stock_rope(model: nn.Module) -> None:
    """Undo `use_fused_rope`, on a model that `check_stock_rope_fits` passed."""
    for module in model.modules():
        if isinstance(module, ExactPhases):
            module.drop_frequencies()
        if isinstance(module, Fused):
            set_class(module, module.longattn_stock)


def _planned(model: PreTrainedModel) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Every module to change with its new class, all of them checked."""
    model_type = model.config.model_type
    if model_type not in FUSED_FAMILIES:
        served = ", ".join(sorted(FUSED_FAMILIES))
        raise ValueError(f"use_fused_rope: model_type {model_type!r} is not served; served are {served}")
    rotary = rotary_modules(model)
    attention = [(name, module) for name, module in model.named_modules() if rotates_once(type(module))]
    layers = model.config.num_hidden_layers
    if not rotary or len(attention) != layers:
        raise ValueError(
            f"use_fused_rope: a {model_type} of {layers} layers needs a rotary module, and in each layer an attention that "
            f"calls {STOCK_APPLY} once, got {len(rotary)} and {len(attention)}; other code has replaced them"
        )
    for name, module in (*rotary, *attention):
        if not forward_is_its_class(module):
            raise ValueError(f"use_fused_rope: the forward of {name} has been replaced by {module.forward!r}")
    for name, module in rotary:
        _check_frequencies(name, module)
    fresh = _fresh(rotary[0][1])
    pairings = {type(module): _interleaved(type(module), fresh) for _, module in attention}
    swaps: list[tuple[nn.Module, type[nn.Module]]] = [(module, fused_rotary(type(module))) for _, module in rotary]
    return swaps + [(module, fused_attention(type(module), pairings[type(module)])) for _, module in attention]


def _fresh(rotary: nn.Module) -> Any:
    """A rotary module as stock builds it from the config, on the CPU."""
    with torch.device("cpu"):
        return type(rotary)(config=rotary.config)


def _check_frequencies(name: str, rotary: nn.Module) -> None:
    """Show that exact frequencies of the config are the module's own, but for what its dtype rounds."""
    fresh = _fresh(rotary)
    for layer_type in layer_types(fresh):
        prefix = prefix_of(layer_type)
        tables = exact_tables(fresh, layer_type)
        held: Tensor = getattr(rotary, f"{prefix}original_inv_freq")
        if held.device.type == "meta":
            raise ValueError(f"use_fused_rope: {name} is on the meta device; load the model's weights first")
        stock = [getattr(fresh, f"{prefix}original_inv_freq")]
        if rope_type_of(fresh, layer_type) == "longrope":
            past = torch.tensor([[original_length(fresh, layer_type)]])
            fresh(torch.zeros(1), past, *([] if layer_type is None else [layer_type]))
            stock.append(getattr(fresh, f"{prefix}inv_freq"))
        pairs = list(zip(stock, tables, [FREQUENCY_RTOL] * 2, strict=False))
        pairs.append((held.cpu(), tables[0], max(FREQUENCY_RTOL, torch.finfo(held.dtype).eps)))
        for found, exact, rtol in pairs:
            if found.shape != exact.shape or not torch.allclose(found.double(), exact, rtol=rtol, atol=0.0):
                raise ValueError(
                    f"use_fused_rope: {name} does not turn by the frequencies of config.rope_parameters "
                    f"{rotary.config.rope_parameters}; was the config edited after the model was built?"
                )


def _interleaved(attention: type[nn.Module], fresh: Any) -> bool:
    """How an attention pairs the channels that it rotates, found by rotating a few random tokens either way."""
    layer_type = layer_types(fresh)[0]
    positions = torch.arange(8, device="cpu")
    noise = torch.Generator().manual_seed(0)
    shape = (1, 2, 8, head_dim_of(fresh.config))
    query, key = (torch.randn(shape, generator=noise, device="cpu") for _ in range(2))
    stock_tables = fresh(query, positions[None], *([] if layer_type is None else [layer_type]))
    stock = stock_apply(attention)(query, key, *stock_tables)
    scaling = getattr(fresh, f"{prefix_of(layer_type)}attention_scaling")
    cos, sin = rope_cos_sin(positions, exact_tables(fresh, layer_type)[0], scaling)
    for interleaved in (False, True):
        fused = apply_rope(query, key, cos, sin, interleaved=interleaved)
        if all(torch.allclose(a, b, rtol=0.0, atol=PROBE_ATOL * scaling) for a, b in zip(fused, stock, strict=True)):
            return interleaved
    raise ValueError(
        f"use_fused_rope: {attention.__name__} pairs the channels that it rotates neither half-split nor interleaved"
    )
