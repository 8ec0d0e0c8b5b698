"""Tiny models of the served families, and the same under stock eager attention with masks from the definition."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from reference import half_shifts, visible_mask
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerFast

from longattn.hf.families import attention_modules
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
SLIDING, FULL = "sliding_attention", "full_attention"
ALTERNATING = dict(sliding_window=8, layer_types=[SLIDING, FULL] * 2)
QWEN2_WINDOWS = dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)
# transformers' grouped experts have no float64
PICKED = dict(num_experts_per_tok=2, experts_implementation="eager")
EXPERTS = dict(num_experts=4, moe_intermediate_size=24, **PICKED)
LOCAL_EXPERTS = dict(num_local_experts=4, **PICKED)
# Phi-3's second length, at which its frequencies change, is its present one here
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1],
    "long_factor": [2.0, 3.0],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT_OSS_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
# What each family has beyond SIZES; None takes a field out. Windows are 8 tokens wide.
EXTRA: dict[str, dict[str, Any]] = {
    "arcee": {},
    "cohere": dict(logit_scale=0.3),
    "cohere2": dict(logit_scale=0.3, **ALTERNATING),
    "cwm": dict(head_dim=8, rope_parameters=LLAMA3, **ALTERNATING),
    "ernie4_5": dict(head_dim=8),
    "gemma": dict(head_dim=16),
    "gemma2": dict(head_dim=16, query_pre_attn_scalar=24, attn_logit_softcapping=2.0, **ALTERNATING),
    "gemma3_text": dict(head_dim=16, query_pre_attn_scalar=24, **ALTERNATING),
    "glm": dict(head_dim=8),
    "glm4": dict(head_dim=8),
    "gpt_neox": dict(num_key_value_heads=None, rotary_pct=0.5),
    "gpt_oss": dict(head_dim=8, rope_parameters=GPT_OSS_YARN, **ALTERNATING, **LOCAL_EXPERTS),
    "granite": dict(attention_multiplier=0.2, embedding_multiplier=2.0, residual_multiplier=0.7, logits_scaling=3.0),
    "granitemoe": dict(attention_multiplier=0.2, **LOCAL_EXPERTS),
    "helium": dict(head_dim=8),
    "llama": {},
    "ministral": dict(head_dim=8, **ALTERNATING),
    "mistral": dict(sliding_window=8),
    "mixtral": dict(sliding_window=8, **LOCAL_EXPERTS),
    "olmo": {},
    "olmo2": {},
    "olmo3": ALTERNATING,
    "olmoe": dict(num_experts=4, **PICKED),
    "phi": {},
    "phi3": dict(sliding_window=8, original_max_position_embeddings=32, rope_parameters=LONGROPE),
    "qwen2": QWEN2_WINDOWS,
    "qwen2_moe": dict(**EXPERTS, shared_expert_intermediate_size=32, **QWEN2_WINDOWS),
    "qwen3": dict(head_dim=16, **QWEN2_WINDOWS),
    "qwen3_moe": dict(head_dim=16, use_sliding_window=True, sliding_window=8, **EXPERTS),
    "seed_oss": dict(head_dim=8, attention_dropout=0.0, residual_dropout=0.0),
    "smollm3": dict(use_sliding_window=True, sliding_window=8, no_rope_layers=[1, 0, 1, 1]),
    "stablelm": dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "starcoder2": dict(sliding_window=8),
}
ALL_FAMILIES = tuple(EXTRA)
# Those without and with windows of their own, in all layers and in some; enough where no family's own ways matter.
FAMILIES = ("llama", "mistral", "qwen2")
# And those whose ways matter in training: a soft cap, a rope for each type of layer, learnt sinks and experts.
TRAINED = (*FAMILIES, "gemma2", "gemma3_text", "gpt_oss")


def build(family: str, dtype: torch.dtype = torch.float64, **fields: Any) -> PreTrainedModel:
    """A seeded model of a family: no dropout, a window of 8 where it has windows."""
    torch.manual_seed(0)
    fields = {**SIZES, **copy.deepcopy(EXTRA[family]), **fields}
    config = CONFIG_MAPPING[family](**{name: value for name, value in fields.items() if value is not None})
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype).eval()


def build_tokenizer(size: int = VOCAB) -> PreTrainedTokenizerFast:
    """`size` tokens, words w0, w1, ... between spaces, and a length that follows the models'."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(size - 3)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def rope_plans(angles: int) -> list[dict[str, Any]]:
    """A plan's rope of every type that changes stored frequencies, for heads with so many angles."""
    factors = {"short_factor": [1.0] * angles, "long_factor": [1.5 + i for i in range(angles)]}
    return [
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "ntk", "factor": 2.0},
        {"rope_type": "by-parts", "factor": 4.0},
        {"rope_type": "llama3", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "factor": 4.0, **factors},
    ]


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # longattn says that its patterns are left out
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
    for attention, pattern in zip(attention_modules(stock), stock.reference_patterns, strict=True):
        mask = score_mask(pattern, batch, length, stock.dtype, **rows)

        def replace(module, args, kwargs, mask=mask):
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(attention.register_forward_pre_hook(replace, with_kwargs=True))
    try:
        return stock(ids, position_ids=position_ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
