"""Put a model and its tokenizer back as they were when a surgery on them fails."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longattn.hf.families import attention_modules
from longattn.hf.rope import rotary_modules
from longattn.vocab_matrix import ModelState, find_matrices
from longattn.vocab_tokens import replace_contents

__all__ = ["unchanged_on_error"]


@contextlib.contextmanager
def unchanged_on_error(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, token_ids: Sequence[int] = ()
) -> Iterator[None]:
    """Undo, on any error inside, what a surgery changes.

    Configs, rotary modules and what modules copied out of the config are held by their attributes, which are replaced,
    never changed in place. Embeddings and tokenizer are held only where `token_ids` are to be added.
    """
    configs = [model.config, getattr(model, "generation_config", None)]
    fields = [(config, dict(vars(config))) for config in configs if config is not None]
    modules = [(module, dict(vars(module)), dict(module._buffers)) for module in _touched(model)]
    embeddings = ModelState(model, find_matrices(model), token_ids) if token_ids else None
    old_tokenizer = copy.deepcopy(tokenizer) if token_ids else None
    length = None if tokenizer is None else tokenizer.model_max_length
    try:
        yield
    except BaseException:
        if embeddings is not None:
            embeddings.restore()
        if old_tokenizer is not None:
            replace_contents(tokenizer, old_tokenizer)
        for module, attributes, buffers in modules:
            _replace(vars(module), attributes)
            _replace(module._buffers, buffers)
        for config, attributes in fields:
            _replace(vars(config), attributes)
        if tokenizer is not None:
            tokenizer.model_max_length = length
        raise


def _touched(model: PreTrainedModel) -> list[nn.Module]:
    """Modules that hold something made from the config."""
    rotary = [module for _, module in rotary_modules(model)]
    return [*rotary, *attention_modules(model), *(m for m in model.modules() if hasattr(m, "has_sliding_layers"))]


def _replace(held: dict[str, Any], by: dict[str, Any]) -> None:
    held.clear()
    held.update(by)
