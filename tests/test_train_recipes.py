"""Recipes: which weights learn in families that differ in names and norms, and that folding them changes nothing."""

from __future__ import annotations

import pytest
import torch
from hf_models import VOCAB, build, tokens
from training_helpers import TRAINING, each_layer, extended, patterns_called
from transformers import AutoModelForCausalLM

from longattn.hf.attention import calls_seen
from longattn.train import longlora, longlora_config, merge, new_rows

# fused projections and other names, norms inside attention, experts and learnt sinks, norms without weights
FAMILIES = ("llama", "phi3", "gpt_neox", "qwen3_moe", "gpt_oss", "olmo")
CASES = [(family, tied) for family in FAMILIES for tied in (False, True) if (family, tied) != ("gpt_neox", True)]
NEW = [5, 7]


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model, ids: torch.Tensor) -> None:
    """One step of gradient descent of all that learns."""
    model.train()
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad / parameter.grad.norm().clamp_min(1e-9)
    model.eval()


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_longlora_trains_projections_embeddings_and_norms_and_folds(family, tied):
    model, ids = build(family, torch.float32, num_hidden_layers=4, tie_word_embeddings=tied), tokens(2, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model, ids)
    adapted = longlora(model, rank=2, new_tokens=NEW)
    assert torch.equal(logits(adapted, ids), expected)  # nothing is learnt yet
    step(adapted, ids)
    trained = logits(adapted, ids)
    folded = merge(adapted)
    assert type(folded) is type(model)
    torch.testing.assert_close(logits(folded, ids), trained, rtol=1e-4, atol=1e-4)
    changed = {name for name, old in before.items() if not torch.equal(folded.state_dict()[name], old)}
    norms = {name for name in before if "norm" in name}
    in_attention = {
        name for name, old in before.items() if (".self_attn." in name or ".attention." in name) and old.dim() == 2
    }
    outputs = {name for name in before if name in ("lm_head.weight", "embed_out.weight")}
    embeddings = {name for name in before if "embed_tokens" in name or "embed_in" in name}
    assert changed == norms | in_attention | embeddings | outputs
    if not tied:
        (output,) = outputs
        rows = (folded.state_dict()[output] != before[output]).any(1).nonzero().flatten().tolist()
        assert rows == NEW


def test_longlora_parts_are_switched_off():
    names = trainable(longlora(build("llama", torch.float32), train_embeddings=False, train_norms=False))
    assert names and all("lora_" in name and ".self_attn." in name for name in names)
    names = trainable(
        longlora(build("llama", torch.float32), train_embeddings=False, train_norms=False, new_tokens=NEW)
    )
    assert sum("trainable_tokens" in name for name in names) == 2


def test_longlora_keeps_the_pattern_of_the_mode():
    model, _, ids = extended()
    adapted = longlora(model, new_tokens=ids)
    with calls_seen() as calls:
        adapted.train()(tokens(1, 12))
    assert patterns_called(calls) == each_layer(model, TRAINING)


def test_config_names_what_longlora_trains():
    model = build("qwen3", torch.float32)
    config = longlora_config(model, rank=3, alpha=5)
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 5, {"q_proj", "k_proj", "v_proj", "o_proj"})
    assert set(config.modules_to_save) >= {"embed_tokens", "q_norm", "input_layernorm", "norm"}
    assert longlora_config(model).lora_alpha == 2 * longlora_config(model).r


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_alone_learn(tied, tmp_path):
    model, _, new = extended(tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = tokens(2, 12)
    ids[:, [2, 6]] = torch.tensor(new)
    adapted = new_rows(model, new)
    step(adapted, ids)
    trained = logits(adapted, ids)
    merge(adapted).save_pretrained(tmp_path)
    folded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(folded, ids), trained)
    for name, old in before.items():
        matrix = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(folded.state_dict()[name][:VOCAB], old[:VOCAB]), name
        assert torch.equal(folded.state_dict()[name], old) != matrix, name


def test_matrices_that_peft_would_untie_are_refused():
    model = build("gpt_neox", torch.float32, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="train_embeddings must be False .* got embed_in of a GPTNeoXForCausal"):
        longlora(model)
    longlora(model, train_embeddings=False)


def test_model_without_adapters_folds_to_itself():
    model = build("llama", torch.float32)
    assert merge(model) is model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: longlora(model, rank=0), "longlora: rank must be an int of at least 1, got 0"),
        (lambda model: longlora(model, dropout=1.0), "longlora: dropout must be at least 0 and below 1, got 1.0"),
        (
            lambda model: longlora(model, new_tokens=[VOCAB]),
            "longlora: ids must be those of rows 0 to 63, got 64",
        ),
        (lambda model: new_rows(model, []), "new_rows: ids must name at least one token, got none"),
        (lambda model: new_rows(model, [-1]), "new_rows: ids must be those of rows 0 to 63, got -1"),
    ],
)
def test_refusals_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(build("llama", torch.float32))


@pytest.mark.parametrize("recipe", [longlora, longlora_config, lambda model: new_rows(model, NEW)])
def test_wrapped_models_are_refused(recipe):
    with pytest.raises(
        TypeError, match="must be a transformers PreTrainedModel, got PeftModelForCausalLM around a Llama"
    ):
        recipe(longlora(build("llama", torch.float32)))
