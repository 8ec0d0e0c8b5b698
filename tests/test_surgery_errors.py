"""Surgery that fails leaves everything as it was, and says why."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from hf_models import FAMILIES, build, build_tokenizer, tokens
from transformers import BertConfig, BertModel, FalconConfig, FalconForCausalLM, T5Config, T5ForConditionalGeneration

from longattn import surgery, vocab_plan
from longattn.hf import proofs, rope
from longattn.plan import Plan
from longattn.surgery import extend, restore

YARN = {"rope_type": "yarn", "factor": 4.0}
EVERYTHING = Plan(
    rope=YARN, attention="window:4, full", train_attention="group:8", tokens={"tokens": {"pad_token": "<pad>"}}
)
IDS = tokens(2, 20)


def state(model, tokenizer) -> dict:
    """All that a surgery could change: configs, tensors, what modules hold, the tokenizer."""
    plain = (bool, int, float, str, type(None))
    return {
        "config": copy.deepcopy(vars(model.config)),
        "generation": copy.deepcopy(vars(model.generation_config)),
        "modules": [
            (name, type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain)})
            for name, module in model.named_modules()
        ],
        "tensors": [
            (name, id(tensor), tensor.dtype, tensor.requires_grad, tensor.detach().tolist())
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        ],
        "tokenizer": (tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.model_max_length),
    }


def fail(*_, **__):
    raise OSError("no room")


def other_frequencies(*_, **__):
    return torch.ones(4, dtype=torch.float64), 1.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("holder", "name", "broken", "error"),
    [
        (rope, "rope_frequencies", other_frequencies, "does not follow config.rope_parameters"),
        (proofs, "longattn_mask", None, "attends through 'longattn', not through longattn"),
        (proofs, "calls_seen", lambda: contextlib.nullcontext([]), "two tokens were attended to by {}"),
        (surgery, "_set_implementation", fail, "no room"),
        (vocab_plan, "add_to", fail, "no room"),
        (surgery, "check_tokens", fail, "no room"),
    ],
    ids=["rope proof", "hook proof", "attention proof", "attention", "tokens", "tokens proof"],
)
def test_error_at_any_stage_changes_nothing(family, earlier, holder, name, broken, error, monkeypatch):
    model, tokenizer = build(family), build_tokenizer()
    if earlier:
        extend(model, tokenizer, Plan(rope={"rope_type": "yarn", "factor": 2.0}, attention="window:6"))
    before, logits = state(model, tokenizer), model(IDS).logits
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, broken)
        with pytest.raises((RuntimeError, OSError), match=error):
            extend(model, tokenizer, EVERYTHING)
    assert state(model, tokenizer) == before
    assert torch.equal(model(IDS).logits, logits)
    assert len(extend(model, tokenizer, EVERYTHING).proofs) == 3


def test_failing_restore_changes_nothing(monkeypatch):
    model, tokenizer = build("qwen2"), build_tokenizer()
    extend(model, tokenizer, EVERYTHING)
    before = state(model, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(surgery, "_set_implementation", fail)
        with pytest.raises(OSError, match="no room"):
            restore(model)
    assert state(model, tokenizer) == before
    restore(model)


REFUSED = [
    (dict(attention="full"), "the plan changes nothing: the layers attend by 4 x full already"),
    (dict(rope={"rope_type": "linear", "factor": 1.0}), "changes no rotary frequency"),
    (dict(rope={"rope_type": "yarn"}), "needs a factor, or context"),
    (dict(rope={"full_attention": {"rope_type": "yarn", "factor": 2.0}}), "the model has one rope for all layers"),
    (dict(attention=["full", "full"]), "one pattern a layer, 4 in all, got 2"),
    (dict(attention="group:65"), "a group must fit into the model's 64 tokens, got group:65"),
    (dict(tokens={"tokens": ["w1"]}), "tokens must be new, got 'w1'"),
]


@pytest.mark.parametrize(("plan", "error"), REFUSED, ids=[error[:20] for _, error in REFUSED])
def test_plan_that_does_not_fit_is_refused_and_changes_nothing(plan, error):
    model, tokenizer = build("llama"), build_tokenizer()
    before = state(model, tokenizer)
    with pytest.raises(ValueError, match=error):
        extend(model, tokenizer, Plan(**plan))
    assert state(model, tokenizer) == before


def test_no_change_of_windows_is_refused():
    with pytest.raises(ValueError, match="attend by 2 x full, 2 x window:8 already"):
        extend(build("qwen2"), None, Plan(attention="2 x full, 2 x window:8"))
    model = build("mistral")
    extend(model, None, Plan(attention="window:8", train_attention="group:8+shift"))
    with pytest.raises(ValueError, match="changes nothing"):
        extend(model, None, Plan(train_attention="group:8+shift"))


def test_attention_weights_are_refused():
    model = build("llama", attn_implementation="eager", output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        extend(model, None, Plan(attention="window:4"))
    extend(model, None, Plan(rope=YARN))


def test_attention_weights_are_refused_in_a_call():
    model = build("llama")
    extend(model, None, Plan(attention="window:4"))
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(IDS, output_attentions=True)


def test_context_alone_needs_patterns_that_bound_the_distances():
    for attention in ("full", "3 x window:8, 1 x full"):
        with pytest.raises(ValueError, match="context alone changes no rotary frequency"):
            extend(build("mistral"), None, Plan(context=128, attention=attention))
    model = build("llama")
    extend(model, None, Plan(context=128, attention="window:8, group:16"))
    assert model.config.max_position_embeddings == 128


def test_group_may_be_as_long_as_the_new_context():
    extend(build("llama"), None, Plan(rope=YARN, attention="group:256"))
    with pytest.raises(ValueError, match="the model's 256 tokens, got group:257"):
        extend(build("llama"), None, Plan(rope=YARN, attention="group:257"))


SMALL = dict(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (lambda: FalconForCausalLM(FalconConfig(**SMALL)), "'falcon' is not served: .*AttentionInterface"),
        (lambda: BertModel(BertConfig(**SMALL)), "'bert' is not served: .*; served are .*, llama, .*, qwen2"),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=16, num_layers=1, d_ff=16, num_heads=2)),
            "'t5' is not served: it is an encoder-decoder",
        ),
        (lambda: build("llama", sliding_window=8), "a llama has no sliding windows, got sliding_window 8"),
        (
            lambda: build("mistral", layer_types=["full_attention"] * 4),
            "a mistral has one kind of layer, got layer_types",
        ),
        (lambda: build("llama", is_causal=False), "only causal decoders are served"),
    ],
)
def test_other_models_are_refused_by_name(model, error):
    with pytest.raises(ValueError, match=error):
        extend(model(), None, Plan(rope=YARN))


def test_arguments_of_other_types_are_refused():
    model = build("llama")
    with pytest.raises(TypeError, match="plan must be a longattn.Plan, got dict"):
        extend(model, None, {"rope": YARN})
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got LlamaConfig"):
        extend(model.config, None, Plan(rope=YARN))
    with pytest.raises(TypeError, match="restore: model must be a transformers PreTrainedModel, got str"):
        restore("model")
    with pytest.raises(ValueError, match="tokenizer must be given where the plan adds tokens, got None"):
        extend(model, None, Plan(tokens={"tokens": ["<a>"]}))


def test_record_of_a_newer_version_is_refused():
    model = build("llama")
    extend(model, None, Plan(rope=YARN))
    model.config.longattn = {**model.config.longattn, "version": 2}
    with pytest.raises(ValueError, match="must be a record of version 1, got 2; update longattn"):
        extend(model, None, Plan(attention="window:4"))
    with pytest.raises(ValueError, match="must be a record of version 1, got 2"):
        restore(model)
