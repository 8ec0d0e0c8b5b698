"""Tiny tokenizers and models of several families, and what a test compares of them."""

from __future__ import annotations

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

LINES = ["def f(x): return x + 1", "the tool returns hello world", "hello tool, hello world"]
HIDDEN = 16
PADDED_ROWS = 320


@functools.cache
def _backend() -> str:
    """A byte-level BPE tokenizer trained on a few lines, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<keep>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    return tokenizer.to_str()


def make_tokenizer(**kwargs: object) -> PreTrainedTokenizerFast:
    """A new tokenizer; two are equal. It has one extra special token, "<keep>"."""
    backend = Tokenizer.from_str(_backend())
    named = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<keep>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**named, **kwargs})


OLD_SIZE = len(make_tokenizer())
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": OLD_SIZE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen2_padded": lambda: Qwen2ForCausalLM(
        Qwen2Config(**{**SIZES, "vocab_size": PADDED_ROWS}, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "llama_padded": lambda: LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "vocab_size": PADDED_ROWS}, num_key_value_heads=1)
    ),
    "phi_bias": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "phi_tied_bias": lambda: PhiForCausalLM(PhiConfig(**SIZES, tie_word_embeddings=True)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "bert_encoder": lambda: BertModel(BertConfig(**{**SIZES, "pad_token_id": 0})),
}


def make_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights, the same each time, off-centre so that means are not near zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = FAMILIES[family]()
        with torch.no_grad():
            for parameter in _matrices(model):
                parameter.copy_(torch.randn(parameter.shape) + 0.5)
    return model.to(dtype).eval()


def _matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight]
    if head is not None:
        found += [p for p in head.parameters() if p is not found[0]]
    return found


def input_rows(model: PreTrainedModel) -> torch.Tensor:
    """The input embedding, (rows, hidden), as it is now."""
    return model.get_input_embeddings().weight.detach().clone()


def output_rows(model: PreTrainedModel) -> torch.Tensor:
    """The output embedding, (rows, hidden), as it is now."""
    return model.get_output_embeddings().weight.detach().clone()


def snapshot(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Everything that a refused call must leave alone, by value and, for modules and parameters, by identity."""
    generation = getattr(model, "generation_config", None)
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "modules": [id(module) for module in model.modules()],
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "sizes": [(getattr(m, "num_embeddings", None), getattr(m, "out_features", None)) for m in model.modules()],
        "config": model.config.to_dict(),
        "generation": None if generation is None else generation.to_dict(),
        "backend": tokenizer.backend_tokenizer.to_str(),
        "special": (tokenizer.special_tokens_map, tokenizer.extra_special_tokens, tokenizer.all_special_tokens),
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    """Two snapshots are equal, tensors bit for bit."""
    torch.testing.assert_close(after.pop("weights"), before.pop("weights"), rtol=0, atol=0)
    torch.testing.assert_close(_held(after), _held(before), rtol=0, atol=0)
    assert after == before


def _held(part: dict[str, object]) -> dict[str, torch.Tensor]:
    gradients: dict[str, torch.Tensor | None] = part.pop("gradients")
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The logits (1, tokens, rows) of a text."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
