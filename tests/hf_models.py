"""Tiny models of the served families, and the same under stock eager attention with masks from the definition."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from reference import half_shifts, visible_mask
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from longattn.pattern import Pattern

LAYERS = 4
HEADS = 4
VOCAB = 64
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,  # large enough for attention to matter
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def build(family: str, dtype: torch.dtype = torch.float64, **fields) -> PreTrainedModel:
    """A seeded model: Mistral with a window of 8 in all layers, Qwen2 with one of 8 in the last two."""
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **fields}))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**SIZES, **{"sliding_window": 8, **fields}))
    else:
        windows = dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **{**windows, **fields}))
    return model.to(dtype).eval()


FAMILIES = ("llama", "mistral", "qwen2")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... w60 between spaces, ids to VOCAB, and a length that follows the models'."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(61)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def score_mask(pattern: Pattern, batch: int, length: int, dtype: torch.dtype, **rows) -> Tensor:
    """The float mask that eager attention adds to its scores: (batch, HEADS, length, length)."""
    if pattern.kind == "group":
        band = dict(group=pattern.size, shifts=half_shifts(HEADS, pattern.shift))
    else:
        band = dict(window=(-1 if pattern.kind == "full" else pattern.size - 1, 0))
    if rows.get("cu_seqlens") is not None:
        # documents of all rows laid one after the other: a row's mask is its square on the diagonal
        seen = visible_mask(1, HEADS, batch * length, batch * length, sinks=pattern.sinks, **band, **rows)[0]
        squares = [seen[:, b * length : (b + 1) * length, b * length : (b + 1) * length] for b in range(batch)]
        seen = torch.stack(squares)
    else:
        seen = visible_mask(batch, HEADS, length, length, sinks=pattern.sinks, **band, **rows)
    # eager takes its softmax in float32, where a row of -inf would be NaN
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(torch.float32).min / 2)


def under_eager(model: PreTrainedModel, patterns: Sequence[Pattern]) -> PreTrainedModel:
    """A copy of an extended model whose layers attend by stock eager attention; masks come from `masked`."""
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("eager")
    stock.reference_patterns = list(patterns)
    return stock


def assert_agree(got: Tensor, ref: Tensor, where: object = "") -> None:
    """Hold float64 logits to the error of a float32 softmax, which is what eager attention takes."""
    error = float((got - ref).norm() / ref.norm())
    assert error < 2e-6, f"{where}: relative error {error:.1e}"


def masked(stock: PreTrainedModel, ids: Tensor, position_ids: Tensor | None = None, **rows) -> Tensor:
    """Logits of a copy made by `under_eager`, all tokens at once, each layer under its own mask."""
    batch, length = ids.shape
    hooks = []
    for layer, pattern in zip(stock.model.layers, stock.reference_patterns, strict=True):
        mask = score_mask(pattern, batch, length, stock.dtype, **rows)

        def replace(module, args, kwargs, mask=mask):
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.self_attn.register_forward_pre_hook(replace, with_kwargs=True))
    try:
        return stock(ids, position_ids=position_ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
