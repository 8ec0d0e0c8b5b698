"""The embedding matrices of a model: finding them, growing them in place, and putting all of it back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Matrices", "ModelState", "Part", "find_matrices", "follow_config", "grow"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# where a module keeps what is registered with it
STORES = ("_parameters", "_buffers", "_modules")
# what a module remembers of its matrix's size, besides the matrix
SIZES = ("num_embeddings", "out_features", "padding_idx", "vocab_size")


@dataclass(frozen=True)
class Part:
    """A matrix with rows of its own, by name ("input" or "output"), and the bias that goes with its rows."""

    name: str
    module: nn.Module
    bias: nn.Parameter | None

    @property
    def weight(self) -> nn.Parameter:
        return self.module.get_parameter("weight")  # (rows, hidden)

    def write(self, ids: Sequence[int], rows: Tensor, biases: Tensor | None) -> None:
        """Write rows (n, hidden) and biases (n,) to the places `ids` (n,), in place."""
        with torch.no_grad():
            places = torch.tensor(ids, dtype=torch.long)
            self.weight[places.to(self.weight.device)] = rows.to(self.weight.device)
            if self.bias is not None and biases is not None:
                self.bias[places.to(self.bias.device)] = biases.to(self.bias.device)


@dataclass(frozen=True)
class Matrices:
    """The input embedding of a model, its output embedding if it has one, and whether they are one matrix."""

    input: nn.Embedding
    output: nn.Linear | nn.Embedding | None
    tied: bool

    @property
    def rows(self) -> int:
        return self.input.weight.shape[0]

    @property
    def parts(self) -> list[Part]:
        """The matrices; the bias of a tied output goes with the input's rows."""
        bias = None if self.output is None else self.output._parameters.get("bias")
        if self.output is None or self.tied:
            return [Part("input", self.input, bias)]
        return [Part("input", self.input, None), Part("output", self.output, bias)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for part in self.parts for p in (part.weight, part.bias) if p is not None]


def find_matrices(model: PreTrainedModel) -> Matrices:
    """Find a model's embedding matrices and check that rows can be added to them."""
    embedding: nn.Embedding = _checked("input", model.get_input_embeddings(), (nn.Embedding,))
    found = model.get_output_embeddings()
    if found is None:
        return Matrices(embedding, None, tied=False)
    head: nn.Linear | nn.Embedding = _checked("output", found, (nn.Linear, nn.Embedding))
    rows, head_rows = embedding.weight.shape[0], head.weight.shape[0]
    if rows != head_rows:
        raise ValueError(
            f"add_tokens: model must have as many rows in its output as in its input embedding ({rows}), "
            f"got {head_rows}"
        )
    tied = head.weight is embedding.weight or head.weight.data_ptr() == embedding.weight.data_ptr()
    if not tied and _would_be_tied(model, embedding.weight, head.weight):
        raise ValueError(
            "add_tokens: model must not have output rows of its own where its config ties them to the input's, got "
            "tie_word_embeddings=True; set it to False to keep both"
        )
    return Matrices(embedding, head, tied)


def _checked(name: str, module: object, kinds: tuple[type[nn.Module], ...]) -> Any:
    """An embedding, if it is one of `kinds` and holds plain numbers."""
    if not isinstance(module, kinds):
        expected = " or ".join(f"nn.{kind.__name__}" for kind in kinds)
        raise TypeError(
            f"add_tokens: model must have an {expected} as its {name} embedding, got {type(module).__name__}; "
            "add tokens before adapters"
        )
    weight = module.get_parameter("weight")
    if weight.dtype not in FLOATS or type(weight.data) is not Tensor:
        raise TypeError(
            f"add_tokens: model must have a plain floating-point {name} embedding, neither quantised nor sharded, "
            f"got {type(weight.data).__name__} of {weight.dtype}"
        )
    if weight.is_meta:
        raise ValueError(f"add_tokens: model must have real values in its {name} embedding, got the meta device")
    return module


def _would_be_tied(model: PreTrainedModel, weight: Tensor, head: Tensor) -> bool:
    """Whether transformers, which ties again whenever it resizes, would make one matrix of two."""
    names = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    pairs = ({id(model.get_parameter_or_buffer(a)), id(model.get_parameter_or_buffer(b))} for a, b in names)
    return {id(weight), id(head)} in pairs


def grow(model: PreTrainedModel, matrices: Matrices, rows: int) -> None:
    """Grow the matrices to `rows` rows, keeping modules, parameters, hooks and torch's random state."""
    head = matrices.output
    devices = [matrices.input.weight.device, *([] if head is None else [head.weight.device])]
    for parameter in matrices.parameters:
        parameter.grad = None  # a gradient of the old size can be added to no other
    with _own_random_state(devices):
        model.resize_token_embeddings(rows, mean_resizing=False)
    made = model.get_output_embeddings()
    if head is not None and made is not head:
        # transformers makes a new module: what it holds goes into the old one, which hooks and optimizers know
        head.weight.data = made.weight.data
        if isinstance(head, nn.Linear):
            head.out_features = rows
            if head.bias is not None:
                head.bias.data = made.bias.data
        else:
            head.num_embeddings = rows
        model.set_output_embeddings(head)
    grown = find_matrices(model)
    if grown.rows != rows or grown.tied != matrices.tied or grown.output is not head:
        raise RuntimeError(f"add_tokens: {type(model).__name__} did not resize its embeddings to {rows} rows")


def follow_config(model: PreTrainedModel, matrices: Matrices, old_rows: int, old_pad: int | None) -> None:
    """Give modules the rows and the pad id that a model built from the changed config would have.

    An embedding gives the row of its pad token no gradient. It follows where its decoder has taken its pad token out of
    the config, which models that never pass one to their embedding don't.
    """
    from transformers import PreTrainedModel

    config, embedding = model.config.get_text_config(), matrices.input
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for module in models:
        if vars(module).get("vocab_size") == old_rows:
            module.vocab_size = config.vocab_size
    if embedding.padding_idx != old_pad or config.pad_token_id == old_pad:
        return
    for module in models:
        held = vars(module).get("padding_idx", embedding) == old_pad
        if held and module.get_input_embeddings() is embedding:
            module.padding_idx = embedding.padding_idx = config.pad_token_id


@contextlib.contextmanager
def _own_random_state(devices: Sequence[torch.device]) -> Iterator[None]:
    """What transformers fills new rows with comes from a seed of its own and leaves torch's generators as they were."""
    others = [device for device in devices if device.type != "cpu"]
    kind = others[0].type if others else "cuda"
    indices = sorted({device.index or 0 for device in others})
    with torch.random.fork_rng(devices=indices, device_type=kind):
        torch.default_generator.manual_seed(0)
        yield


class ModelState:
    """What adding tokens can change in a model, by reference: only the rows that are written over are copied."""

    def __init__(self, model: PreTrainedModel, matrices: Matrices, ids: Sequence[int]) -> None:
        self._modules = [
            (module, {store: dict(vars(module)[store]) for store in STORES}, _sizes(module))
            for module in model.modules()
        ]
        self._data = [(parameter, parameter.data, parameter.grad) for parameter in model.parameters()]
        configs = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
        self._configs = [(config, dict(vars(config))) for config in configs if config is not None]
        inside = torch.tensor([i for i in ids if i < matrices.rows], dtype=torch.long)
        self._rows = [
            (parameter.data, inside.to(parameter.device), parameter.data[inside.to(parameter.device)])
            for parameter in matrices.parameters
        ]

    def restore(self) -> None:
        """Put everything back: modules, parameters and their values, gradients, sizes, configs."""
        for module, stores, sizes in self._modules:
            for store, held in stores.items():
                vars(module)[store].clear()
                vars(module)[store].update(held)
            for name in _sizes(module):
                delattr(module, name)
            vars(module).update(sizes)
        with torch.no_grad():
            for parameter, data, gradient in self._data:
                if parameter.shape != data.shape:
                    parameter.grad = None
                    parameter.data = data
                parameter.grad = gradient
            for part, ids, rows in self._rows:
                part[ids] = rows
        for config, fields in self._configs:
            vars(config).clear()
            vars(config).update(fields)


def _sizes(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in SIZES if name in vars(module)}
