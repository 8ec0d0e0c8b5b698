"""`use_fused_rope`: which models it can serve, swapping a model's modules whole or not at all, and undoing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longattn.hf.families import attention_modules, family_of
from longattn.hf.fused_modules import (
    STOCK_APPLY,
    ExactPhases,
    Fused,
    exact_tables,
    forward_is_its_class,
    fused_class,
    layer_types,
    original_length,
    prefix_of,
    rope_type_of,
    rotates_once,
    set_class,
    stock_apply,
)
from longattn.hf.rope import FREQUENCY_RTOL, rotary_modules
from longattn.ops.apply_rope import apply_rope
from longattn.rope import rope_cos_sin
from longattn.wrappers import check_model

__all__ = ["check_stock_rope_fits", "has_fused_rope", "use_fused_rope", "use_stock_rope"]

# of random tokens turned by less than 8 radians; another pairing, direction or table is off by about 1
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
    config = model.config
    family = family_of(config, "use_fused_rope")
    rotary, attention = rotary_modules(model), attention_modules(model)
    if not rotary or len(attention) != config.num_hidden_layers:
        raise ValueError(
            f"use_fused_rope: a {config.model_type} of {config.num_hidden_layers} layers must have a rotary module and "
            f"as many attention modules, got {len(rotary)} and {len(attention)}; other code has replaced them"
        )
    for name, module in rotary:
        _check_frequencies(name, module)
    fresh = _fresh(rotary[0][1])
    for cls in dict.fromkeys(type(module) for module in attention):
        _check_rotation(cls, fresh, family.interleaved)
    for module in (*(module for _, module in rotary), *attention):
        if not forward_is_its_class(module):
            raise ValueError(f"use_fused_rope: a {type(module).__name__} has another forward than its class")
    return [
        *((module, fused_class(type(module), None)) for _, module in rotary),
        *((module, fused_class(type(module), family.interleaved)) for module in attention),
    ]


def _fresh(rotary: nn.Module) -> Any:
    """A rotary module as transformers builds it from the config, on the CPU."""
    with torch.device("cpu"):
        return type(rotary)(config=rotary.config)


def _check_frequencies(name: str, rotary: nn.Module) -> None:
    """Show that a module turns by the exact frequencies of its config, but for what its dtype rounds."""
    fresh = _fresh(rotary)
    parameters = fresh.config.rope_parameters
    for layer_type in layer_types(fresh):
        prefix = prefix_of(layer_type)
        exact = exact_tables(fresh, layer_type)
        held: Tensor = getattr(rotary, f"{prefix}original_inv_freq")
        if held.device.type == "meta":
            raise ValueError(f"use_fused_rope: {name} is on the meta device; load the model's weights first")
        stock = [getattr(fresh, f"{prefix}original_inv_freq")]
        if rope_type_of(fresh, layer_type) == "longrope":
            past = torch.tensor([[original_length(fresh, layer_type)]], device="cpu")
            fresh(torch.zeros(1, device="cpu"), past, *_arguments(layer_type))
            stock.append(getattr(fresh, f"{prefix}inv_freq"))
        for found, expected in (*zip(stock, exact, strict=True), (held.cpu(), exact[0])):
            rtol = max(FREQUENCY_RTOL, torch.finfo(found.dtype).eps)
            if found.shape != expected.shape or not torch.allclose(found.double(), expected, rtol=rtol, atol=0.0):
                raise ValueError(
                    f"use_fused_rope: {name} does not turn by the frequencies of config.rope_parameters {parameters}; "
                    "was the config edited after the model was built?"
                )


def _check_rotation(attention: type[nn.Module], fresh: Any, interleaved: bool) -> None:
    """Show on a few random tokens that `apply_rope` rotates as the function that an attention calls now."""
    if not rotates_once(attention):
        raise ValueError(f"use_fused_rope: the forward of {attention.__name__} does not call {STOCK_APPLY} once")
    layer_type = layer_types(fresh)[0]
    inv_freq = exact_tables(fresh, layer_type)[0]
    positions = torch.arange(8, device="cpu")
    noise = torch.Generator().manual_seed(0)
    shape = (1, 2, 8, 2 * inv_freq.numel())  # the channels that rotate; some attentions pass no others
    query, key = (torch.randn(shape, generator=noise, device="cpu") for _ in range(2))
    tables = fresh(torch.zeros(1, device="cpu"), positions[None], *_arguments(layer_type))
    stock = stock_apply(attention)(query, key, *tables)
    scaling = getattr(fresh, f"{prefix_of(layer_type)}attention_scaling")
    fused = apply_rope(query, key, *rope_cos_sin(positions, inv_freq, scaling), interleaved=interleaved)
    if not all(torch.allclose(a, b, rtol=0.0, atol=PROBE_ATOL * scaling) for a, b in zip(fused, stock, strict=True)):
        raise ValueError(f"use_fused_rope: {attention.__name__} rotates in another way than longattn.apply_rope")


def _arguments(layer_type: str | None) -> tuple[str, ...]:
    """What a rotary module is called with besides the positions."""
    return () if layer_type is None else (layer_type,)
