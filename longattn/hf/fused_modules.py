"""The classes that modules of a model with fused rope have; changes with how transformers' modules rotate.

transformers' rotary module hands (cos, sin) to every layer, whose attention calls the global `apply_rotary_pos_emb` of
its modelling file. Modules of one model get a subclass of their class: the rotary ones form exact phases, the attention
ones run the same code with another name in that global's place. Nothing that other models use changes; the modelling
file gains a name that the new code alone reads.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from itertools import pairwise
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import dynamic_rope_update

from longattn.hf.rope import head_dim_of
from longattn.ops.apply_rope import apply_rope
from longattn.rope import rope_cos_sin, rope_frequencies, rope_layers

__all__ = [
    "ExactPhases",
    "Fused",
    "exact_tables",
    "forward_is_its_class",
    "fused_class",
    "layer_types",
    "original_length",
    "prefix_of",
    "rope_type_of",
    "rotates_once",
    "set_class",
    "stock_apply",
]

STOCK_APPLY = "apply_rotary_pos_emb"
Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Fused(nn.Module):
    """A changed module. Its class exists at run time only, so copies and pickles name the stock class."""

    longattn_stock: type[nn.Module]
    longattn_interleaved: bool | None  # None for rotary modules

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = tuple(super().__reduce_ex__(max(2, protocol)))
        return _blank, (self.longattn_stock, self.longattn_interleaved), *state

    def extra_repr(self) -> str:
        return "longattn.rope_cos_sin" if self.longattn_interleaved is None else "longattn.apply_rope"


class ExactPhases(Fused):
    """The forward of a rotary module, before the stock class, whose state and rules stay.

    The float64 frequencies are buffers of the same bits as int64: they follow the module's device, and what casts the
    floats of a model or of its inputs (`model.to`, the mixed precision of FSDP and DeepSpeed) does not round them. For
    the same reason cos and sin travel to the layers as the integers of their bits.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.set_frequencies()

    def set_frequencies(self) -> None:
        """Form the frequencies that the config gives; a rotary module that is rebuilt takes them from a fresh one."""
        device = next(self.buffers()).device
        for layer_type in layer_types(self):
            if rope_type_of(self, layer_type) != "dynamic":
                bits = torch.stack(exact_tables(self, layer_type)).view(torch.int64).to(device)
                self.register_buffer(f"{prefix_of(layer_type)}inv_freq_bits", bits, persistent=False)

    def drop_frequencies(self) -> None:
        for name in [name for name in self._buffers if name.endswith("inv_freq_bits")]:
            delattr(self, name)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        inv_freq = self._inv_freq(x, position_ids, layer_type).to(position_ids.device)
        scaling = getattr(self, f"{prefix_of(layer_type)}attention_scaling")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = rope_cos_sin(position_ids, inv_freq, scaling, dtype=dtype)  # (B, S, rotary_dim / 2)
        bits = torch.int64 if dtype == torch.float64 else torch.int32
        return cos.view(bits), sin.view(bits)

    def _inv_freq(self, x: Tensor, position_ids: Tensor, layer_type: str | None) -> Tensor:
        """The float64 frequencies for these positions, (rotary_dim / 2,)."""
        prefix, rope_type = prefix_of(layer_type), rope_type_of(self, layer_type)
        if rope_type == "dynamic":
            _follow_length(self, x, position_ids, layer_type)
            length: Any = getattr(self, f"{prefix}max_seq_len_cached", None) or self.max_seq_len_cached
            return _exact(self, layer_type, int(length))
        tables = getattr(self, f"{prefix}inv_freq_bits").view(torch.float64)
        if rope_type != "longrope":
            return tables[0]
        is_long = position_ids.max() + 1 > original_length(self, layer_type)
        return torch.where(is_long.to(tables.device), tables[1], tables[0])


@dynamic_rope_update
def _follow_length(module: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> None:
    """The decorator is transformers' rule of which length "dynamic" frequencies are for; it keeps it in the module."""


def layer_types(rotary: nn.Module) -> list[str | None]:
    """The layer types that a rotary module has frequencies for; [None] where all layers share them."""
    layers = rope_layers(_config(rotary).rope_parameters)
    return [layer_type for layer_type in layers if hasattr(rotary, f"{prefix_of(layer_type)}original_inv_freq")]


def prefix_of(layer_type: str | None) -> str:
    """What the names of a layer type's attributes in a rotary module start with."""
    return "" if layer_type is None else f"{layer_type}_"


def rope_type_of(rotary: nn.Module, layer_type: str | None) -> str:
    """The `rope_type` of a layer type's frequencies."""
    kind: Any = rotary.rope_type
    return kind if layer_type is None else kind[layer_type]


def exact_tables(rotary: nn.Module, layer_type: str | None) -> list[Tensor]:
    """The config's float64 frequencies, on the CPU: those of short texts, and longrope's of long ones."""
    short = _exact(rotary, layer_type)
    if rope_type_of(rotary, layer_type) != "longrope":
        return [short]
    return [short, _exact(rotary, layer_type, original_length(rotary, layer_type) + 1)]


def original_length(rotary: nn.Module, layer_type: str | None) -> int:
    """Tokens up to which longrope takes its short list."""
    return rope_layers(_config(rotary).rope_parameters)[layer_type]["original_max_position_embeddings"]


def _exact(rotary: nn.Module, layer_type: str | None, seq_len: int | None = None) -> Tensor:
    config = _config(rotary)
    parameters = rope_layers(config.rope_parameters)[layer_type]
    length = config.max_position_embeddings
    with torch.device("cpu"):
        return rope_frequencies(parameters, head_dim_of(config), max_position_embeddings=length, seq_len=seq_len)[0]


def _config(rotary: nn.Module) -> Any:
    return rotary.config


def _rotate_half_split(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return apply_rope(q, k, _from_bits(cos), _from_bits(sin))


def _rotate_interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return apply_rope(q, k, _from_bits(cos), _from_bits(sin), interleaved=True)


def _from_bits(table: Tensor) -> Tensor:
    return table.view(torch.float64 if table.dtype == torch.int64 else torch.float32)


def rotates_once(cls: type[nn.Module]) -> bool:
    """Whether a class's forward is plain code that reads the global `apply_rotary_pos_emb` in one place."""
    chain = _decorated(cls)
    if not all(isinstance(function, FunctionType) for function in chain):
        return False
    if not all(_holds(outer, inner) for outer, inner in pairwise(chain)):
        return False
    reads = [step.opname for step in dis.get_instructions(chain[-1]) if step.argval == STOCK_APPLY]
    return len(reads) == 1 and reads[0].startswith("LOAD_GLOBAL") and STOCK_APPLY in chain[-1].__globals__


def stock_apply(cls: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function that the forward of a class which `rotates_once` calls."""
    return _decorated(cls)[-1].__globals__[STOCK_APPLY]


def _decorated(cls: type[nn.Module]) -> list[Any]:
    """A class's forward, and what its decorators (transformers' for renamed arguments) wrap, down to its own code."""
    chain: list[Any] = [getattr(cls, "forward", None)]
    while hasattr(chain[-1], "__wrapped__"):
        chain.append(chain[-1].__wrapped__)
    return chain


def _holds(decorator: FunctionType, wrapped: FunctionType) -> bool:
    return any(cell.cell_contents is wrapped for cell in decorator.__closure__ or ())


_classes: dict[tuple[type[nn.Module], bool | None], type[Any]] = {}


def fused_class(stock: type[nn.Module], interleaved: bool | None) -> type[Any]:
    """The class for modules of a stock class: rotary ones where `interleaved` is None, else attention.

    Two threads may make one each; nothing asks whether two modules have the same.
    """
    key = stock, interleaved
    if key not in _classes:
        _classes[key] = _fused_attention(stock, interleaved) if interleaved is not None else _fused_rotary(stock)
    return _classes[key]


def _fused_rotary(stock: type[nn.Module]) -> type[Any]:
    return _subclass(stock, ExactPhases, None, {})


def _fused_attention(stock: type[nn.Module], interleaved: bool) -> type[Any]:
    """An attention class whose forward calls `longattn.apply_rope`.

    The code is the stock one but for the name of one global, and its globals are the modelling file's own, so that
    whatever else it reads there stays live, and `torch.compile` guards on the file as it does for the stock code.
    """
    rotate = _rotate_interleaved if interleaved else _rotate_half_split
    name = f"_longattn{rotate.__name__}"
    *decorators, forward = _decorated(stock)
    forward.__globals__[name] = rotate
    names = tuple(name if other == STOCK_APPLY else other for other in forward.__code__.co_names)
    fused = _copied(forward, forward.__code__.replace(co_names=names), forward.__closure__)
    for decorator in reversed(decorators):
        wrapped = decorator.__wrapped__
        cells = tuple(CellType(fused) if cell.cell_contents is wrapped else cell for cell in decorator.__closure__)
        fused = _copied(decorator, decorator.__code__, cells, __wrapped__=fused)
    return _subclass(stock, Fused, interleaved, {"forward": fused})


def _copied(function: FunctionType, code: CodeType, closure: tuple[CellType, ...] | None, **fields: Any) -> Any:
    """A function that is another one but for its code, closure and some attributes."""
    copied = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__, copied.__annotations__ = function.__kwdefaults__, function.__annotations__
    copied.__qualname__, copied.__doc__ = function.__qualname__, function.__doc__
    vars(copied).update({**vars(function), **fields})
    return copied


def _subclass(stock: type[nn.Module], mixin: type[Any], interleaved: bool | None, members: dict[str, Any]) -> type[Any]:
    """A subclass under the stock class's name, by which FSDP, adapters and transformers look modules up."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(
        stock.__name__,
        (mixin, stock),
        {**names, "longattn_stock": stock, "longattn_interleaved": interleaved, **members},
    )


def _blank(stock: type[nn.Module], interleaved: bool | None) -> nn.Module:
    """An empty module of a changed class, for copies and pickles to fill."""
    return nn.Module.__new__(fused_class(stock, interleaved))


def forward_is_its_class(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward, if only beneath accelerate's hooks."""
    own = vars(module)
    return "forward" not in own or any(_is_bound_forward(module, own.get(name)) for name in ("_old_forward", "forward"))


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change a module's class, and the bound forward of the old one that accelerate keeps where it hooks modules."""
    held = [name for name in ("_old_forward", "forward") if _is_bound_forward(module, vars(module).get(name))]
    module.__class__ = cls
    for name in held:
        vars(module)[name] = MethodType(cls.forward, module)


def _is_bound_forward(module: nn.Module, value: Any) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is type(module).forward
