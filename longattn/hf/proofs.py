"""Look at a changed model and say what holds: its attention, its caches, its new rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from longattn.hf.attention import calls_seen, longattn_attention
from longattn.hf.caches import BandLayer
from longattn.hf.families import attention_modules, config_of, layer_of
from longattn.hf.masks import longattn_mask
from longattn.hf.record import IMPLEMENTATION, layer_patterns
from longattn.pattern import Pattern
from longattn.vocab import TokenReport

__all__ = ["check_attention", "check_tokens"]


def check_attention(model: PreTrainedModel) -> str:
    """Show that every layer attends by its recorded pattern, and that caches keep the keys that it shows.

    Runs two tokens through the decoder, where its weights are there; on the meta device looks at what would be called.

    Returns:
        One line that says what was looked at.

    Raises:
        RuntimeError: a layer is not served by longattn, or a cache would forget a key too early.
    """
    patterns = layer_patterns(model.config) or []
    _check_hook(model)
    _check_caches(model, patterns)
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return f"{len(patterns)} layers are hooked; caches keep the keys that they see"
    eager = torch.compiler.set_stance("force_eager")  # a compiled layer runs no Python that could be looked at
    with calls_seen() as calls, _evaluating(model), torch.no_grad(), eager:
        device = next(model.get_input_embeddings().parameters()).device  # adapters wrap the embedding
        model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    found = {layer_of(module): pattern for module, pattern in calls}
    if found != dict(enumerate(patterns)):
        expected = _listed(dict(enumerate(patterns)))
        raise RuntimeError(f"extend: two tokens were attended to by {_listed(found)}, but the plan says {expected}")
    return f"{len(patterns)} layers attended by their patterns; caches keep the keys that they see"


def check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: TokenReport) -> str:
    """Show that tokenizer, embeddings and config agree about the new tokens.

    Returns:
        One line that says what was looked at.

    Raises:
        RuntimeError: they do not.
    """
    read = {token: tokenizer.convert_tokens_to_ids(token) for token in report.ids}
    if read != report.ids:
        raise RuntimeError(
            f"extend: the tokenizer gives the new tokens the ids {read}, but they were to have {report.ids}"
        )
    matrices = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    ids = torch.tensor(list(report.ids.values()))
    for name, module in matrices.items():
        if module is None:
            continue
        rows = module.weight.detach()[ids.to(module.weight.device)]
        if module.weight.shape[0] != report.rows[1] or not bool(rows.isfinite().all()):
            raise RuntimeError(
                f"extend: the {name} embedding does not hold {report.rows[1]} rows, with finite new ones"
            )
    vocab_size = model.config.get_text_config().vocab_size
    if vocab_size != report.rows[1]:
        raise RuntimeError(f"extend: config.vocab_size is {vocab_size}, but the embeddings have {report.rows[1]} rows")
    return f"{len(report.ids)} new token(s) are read by the tokenizer and have finite rows"


def _check_hook(model: PreTrainedModel) -> None:
    modules = attention_modules(model)
    if len(modules) != model.config.num_hidden_layers:
        raise RuntimeError(f"extend: found {len(modules)} attention modules in {model.config.num_hidden_layers} layers")
    for module in modules:
        name = config_of(module)._attn_implementation
        served = name == IMPLEMENTATION and AttentionInterface().get(name) is longattn_attention
        if not served or AttentionMaskInterface().get(name) is not longattn_mask:
            raise RuntimeError(f"extend: layer {layer_of(module)} attends through {name!r}, not through longattn")


def _check_caches(model: PreTrainedModel, patterns: Sequence[Pattern]) -> None:
    for layer, (pattern, slots) in enumerate(zip(patterns, DynamicCache(config=model.config).layers, strict=True)):
        served = slots.pattern == pattern if isinstance(slots, BandLayer) else not getattr(slots, "is_sliding", False)
        if not served:
            raise RuntimeError(f"extend: layer {layer} sees {pattern}, but {type(slots).__name__} would cache its keys")


def _listed(patterns: dict[int, Pattern]) -> str:
    return str({layer: str(pattern) for layer, pattern in sorted(patterns.items())})


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while; modules may have been in different modes before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
