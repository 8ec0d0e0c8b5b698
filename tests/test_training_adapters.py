"""PEFT on extended models: LongLoRA's recipe, training only new rows, saving, reloading, merging, and the order."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import VOCAB, tokens
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from training_helpers import PLAN, SERVING, TRAINING, each_layer, extended, patterns_called
from transformers import AutoModelForCausalLM

from longattn.hf.attention import calls_seen
from longattn.plan import Plan
from longattn.surgery import extend, restore
from longattn.vocab import add_tokens

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
FIELDS = {"initializer_range": 0.1}
STEPS = 5


def lora(**modules) -> LoraConfig:
    return LoraConfig(r=4, target_modules=PROJECTIONS, **modules)


def long_lora(tied: bool) -> LoraConfig:
    """LongLoRA's recipe: low-rank attention, embeddings and norms whole."""
    return lora(modules_to_save=["embed_tokens", *NORMS], ensure_weight_tying=tied)


def new_rows(ids: list[int], tied: bool) -> LoraConfig:
    """Low-rank attention and the rows of new tokens; a tied output follows its input."""
    matrices = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    return lora(trainable_token_indices={name: ids for name in matrices})


def texts(new_ids: list[int]) -> torch.Tensor:
    ids = tokens(2, 20)
    ids[:, [3, 11]] = torch.tensor(new_ids)
    return ids


def train(model: PeftModel, ids: torch.Tensor) -> list[float]:
    """The loss of each step."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


@pytest.mark.parametrize("recipe", ["long_lora", "new_rows"])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_train_save_reload_and_merge(tmp_path, recipe, tied):
    base, _, new_ids = extended(tie_word_embeddings=tied, **FIELDS)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before, ids = weights(base), texts(new_ids)
    model = get_peft_model(base, long_lora(tied) if recipe == "long_lora" else new_rows(new_ids, tied))
    losses = train(model, ids)
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False)), losses
    expected = logits(model, ids)
    assert float((expected - logits(base_of(tmp_path), ids)).norm() / expected.norm()) > 1e-2

    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(tmp_path), tmp_path / "adapter"), ids), expected)
    again, *_ = extended(tie_word_embeddings=tied, **FIELDS)  # the same plan on the same model
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "adapter"), ids), expected)
    reloaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(reloaded, ids), expected)

    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-4)
    after = merged.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old_kept = torch.equal(after[name][:VOCAB], before[name][:VOCAB])
        new_kept = torch.equal(after[name][VOCAB:], before[name][VOCAB:])
        trained = recipe == "new_rows" or tied or "embed" in name
        assert new_kept != trained, name
        assert old_kept == (recipe == "new_rows" or not trained), name
    kept_norms = torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    assert kept_norms == (recipe == "new_rows")

    merged.save_pretrained(tmp_path / "merged")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(served, ids), logits(merged, ids))
    with calls_seen() as calls:
        logits(served, ids)
    assert patterns_called(calls) == each_layer(served, SERVING)


def base_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def test_only_new_rows_train_without_low_rank_layers(tmp_path):
    base, _, new_ids = extended(**FIELDS)
    before, ids = weights(base), texts(new_ids)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=both(new_ids)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" not in name and parameter.requires_grad)
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    after = model.merge_and_unload().state_dict()
    for name, old in before.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(after[name][:VOCAB], old[:VOCAB])
            assert not torch.equal(after[name][VOCAB:], old[VOCAB:])
        else:
            assert torch.equal(after[name], old), name


def both(ids: list[int]) -> dict[str, list[int]]:
    return {"embed_tokens": ids, "lm_head": ids}


def test_unfrozen_norms_train_beside_adapters():
    base, _, new_ids = extended(**FIELDS)
    before = weights(base)
    model = get_peft_model(base, lora())
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed_tokens" in name:
            parameter.requires_grad_(True)
    losses = train(model, texts(new_ids))
    assert losses[-1] < losses[0]
    after = model.unload().state_dict()
    changed = {name for name, old in before.items() if not torch.equal(after[name], old)}
    assert changed == {name for name in before if "norm" in name or "embed_tokens" in name}


def test_adapters_attend_by_the_pattern_of_the_mode():
    base, _, new_ids = extended(**FIELDS)
    model = get_peft_model(base, lora())
    ids = texts(new_ids)
    model.gradient_checkpointing_enable()
    for training, patterns, times in ((True, TRAINING, 2), (False, SERVING, 1), (True, TRAINING, 2)):
        model.train(training)
        with calls_seen() as calls:
            model(ids, labels=ids).loss.backward()
        assert patterns_called(calls) == each_layer(base, patterns, times if training else 1)
    with calls_seen() as calls:
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert patterns_called(calls) == each_layer(base, SERVING, 3)


WRAPPERS = {
    "adapters": lambda model: get_peft_model(model, lora()),
    "compiled": torch.compile,
    "parallel": torch.nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_models_are_refused(wrap):
    base, tokenizer, _ = extended(**FIELDS)
    model = wrap(base)
    before, record = weights(model), copy.deepcopy(base.config.to_dict())
    got = f"must be a transformers PreTrainedModel, got {type(model).__name__} around a LlamaForCausalLM; give the "
    for function, call in {
        "extend": lambda: extend(model, tokenizer, PLAN),
        "restore": lambda: restore(model),
        "add_tokens": lambda: add_tokens(model, tokenizer, ["<c>"]),
    }.items():
        with pytest.raises(TypeError, match=f"^{function}: model {got}model itself, before adapters"):
            call()
    assert base.config.to_dict() == record
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_model_inside_adapters_is_changed_but_for_adapted_embeddings():
    base, tokenizer, new_ids = extended(**FIELDS)
    model = get_peft_model(base, new_rows(new_ids, tied=False))
    ids = texts(new_ids)
    train(model, ids)
    changed = logits(model, ids)
    restore(model.get_base_model())
    assert float((logits(model, ids) - changed).norm()) > 1e-2
    again = Plan(rope=PLAN.rope, attention=PLAN.attention, train_attention=PLAN.train_attention)
    extend(model.get_base_model(), None, again)
    assert torch.equal(logits(model, ids), changed)
    with pytest.raises(TypeError, match="add_tokens: model must have an nn.Embedding .* add tokens before adapters"):
        add_tokens(model.get_base_model(), tokenizer, ["<c>"])


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_added_in_inference_mode_train(tied):
    model, tokenizer, _ = extended(tie_word_embeddings=tied, **FIELDS)
    with torch.inference_mode():
        new_ids = list(add_tokens(model, tokenizer, ["<c>", "<d>"]).ids.values())
    ids = texts(new_ids)
    model.train()(ids, labels=ids).loss.backward()
    assert float(model.lm_head.weight.grad[new_ids].norm()) > 0


@pytest.mark.parametrize("tied", [False, True])
def test_model_made_in_inference_mode_gets_tokens_outside_it(tied):
    expected, tokenizer, _ = extended(tie_word_embeddings=tied, **FIELDS)
    add_tokens(expected, tokenizer, ["<c>"])
    with torch.inference_mode():
        model, tokenizer, new_ids = extended(tie_word_embeddings=tied, **FIELDS)
    add_tokens(model, tokenizer, ["<c>"])
    assert torch.equal(logits(model, texts(new_ids)), logits(expected, texts(new_ids)))
