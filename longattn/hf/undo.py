"""Put a model back as it was when a surgery on it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longattn.hf.families import attention_modules
from longattn.hf.rope import rotary_modules

__all__ = ["unchanged_on_error"]


@contextlib.contextmanager
def unchanged_on_error(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[None]:
    """Undo, on any error inside, what a surgery changes; new tokens have an undo of their own.

    Configs, rotary modules and what modules copied out of the config are held by their attributes, which are replaced,
    never changed in place.
    """
    configs = [model.config, getattr(model, "generation_config", None)]
    fields = [(config, dict(vars(config))) for config in configs if config is not None]
    modules = [(module, dict(vars(module)), dict(module._buffers)) for module in _touched(model)]
    length = None if tokenizer is None else tokenizer.model_max_length
    try:
        yield
    except BaseException:
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
    return [*rotary, *attention_modules(model)]


def _replace(held: dict[str, Any], by: dict[str, Any]) -> None:
    held.clear()
    held.update(by)
