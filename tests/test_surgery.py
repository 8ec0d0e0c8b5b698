"""`extend` and `restore` on whole models: what changes, what is saved, what comes back."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import FAMILIES, build, build_tokenizer, rope_plans, tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from longattn.plan import Plan
from longattn.report import Change
from longattn.rope import rope_frequencies
from longattn.surgery import extend, restore

YARN = {"rope_type": "yarn", "factor": 4.0}
# wider and narrower than the families' own windows, and all kinds of change at once
PLANS = {
    "rope": dict(rope=YARN),
    "context": dict(rope={"rope_theta": 500000.0}, context=512),
    "attention": dict(attention="window:4, window:16+sinks:2, full, group:6+shift"),
    "narrow": dict(attention="window:4"),
    "training": dict(train_attention="group:8+shift"),
    "tokens": dict(tokens={"tokens": ["<a>", "<b>"]}),
    "all": dict(
        rope=YARN, attention="window:12, full", train_attention="group:8", tokens={"tokens": {"pad_token": "<pad>"}}
    ),
}
IDS = tokens(2, 40)


def plain_attributes(model):
    """What rotary and attention modules, and those above them, hold of rope and windows."""
    others = ("name_or_path", "vocab_size", "padding_idx", "num_embeddings", "out_features")
    kinds = (bool, int, float, str, type(None))
    return [
        {k: v for k, v in vars(module).items() if isinstance(v, kinds) and k not in others and k[0] != "_"}
        for module in model.modules()
    ]


def reload(model, path):
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


@torch.no_grad()
@pytest.mark.parametrize("rope", rope_plans(4), ids=lambda rope: rope["rope_type"])
def test_rope_takes_effect_and_reloads_bit_for_bit(rope, tmp_path):
    model = build("llama", torch.float32)
    before, long_ids = model(IDS).logits, tokens(1, 100)
    report = extend(model, None, Plan(rope=rope))
    config = model.config
    assert config.rope_parameters["rope_theta"] == 10000.0 or rope["rope_type"] == "ntk"
    assert type(config.max_position_embeddings) is int
    assert config.max_position_embeddings == (64 if rope["rope_type"] == "dynamic" else 64 * rope["factor"])
    expected, scaling = rope_frequencies(
        config.rope_parameters, 8, max_position_embeddings=config.max_position_embeddings
    )
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected.float(), rtol=1e-6, atol=0)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(scaling)
    assert "rotary" in report.proofs[0]
    if rope["rope_type"] != "dynamic":
        assert not torch.equal(model(IDS).logits, before)
    again = reload(model, tmp_path)
    assert again.config._attn_implementation == "sdpa"  # plain transformers serves it
    for ids in (long_ids, IDS):
        assert torch.equal(again(ids).logits, model(ids).logits)
    restore(again)
    assert torch.equal(again(IDS).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_save_reload_and_restore(family, plan, tmp_path):
    model, stock, tokenizer = build(family, torch.float32), build(family, torch.float32), build_tokenizer()
    plan = Plan(**PLANS[plan])
    report = extend(model, tokenizer, plan)
    json.dumps(report.to_dict())
    again = reload(model, tmp_path / "1")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert plain_attributes(again) == plain_attributes(model)
    assert again.config.longattn == model.config.longattn and again.config.longattn["plan"] == plan.to_dict()
    # what transformers reads it also has to write again
    third = reload(again, tmp_path / "2")
    assert torch.equal(third(IDS).logits, model(IDS).logits)
    assert third.train()(IDS).logits.equal(model.train()(IDS).logits)
    for saved in ("1", "2"):
        written = json.loads((tmp_path / saved / "config.json").read_text())
        wanted = "longattn" if plan.attention or plan.train_attention else None
        assert written.get("attn_implementation") == wanted
    for changed in (model, third):
        restore(changed.eval())
        assert torch.equal(changed(IDS).logits[..., :64], stock(IDS).logits)
        assert changed.config._attn_implementation == "sdpa"
        different = {k for k in stock.config.to_dict() if stock.config.to_dict()[k] != changed.config.to_dict().get(k)}
        assert different <= {"vocab_size", "pad_token_id", "architectures", "dtype", "_name_or_path"}
        assert not hasattr(changed.config, "longattn")
    fourth = reload(third, tmp_path / "3")
    assert torch.equal(fourth(IDS).logits, third(IDS).logits) and fourth.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_extending_twice_keeps_the_first_original():
    model, stock = build("qwen2"), build("qwen2")
    extend(model, None, Plan(rope=YARN, attention="window:4"))
    report = extend(model, None, Plan(rope={"rope_type": "yarn", "factor": 2.0}, train_attention="group:8"))
    assert model.config.max_position_embeddings == 64 * 8
    assert model.config.rope_parameters["factor"] == 8.0
    assert model.config.rope_parameters["original_max_position_embeddings"] == 64
    record = model.config.longattn
    assert record["original"]["max_position_embeddings"] == 64
    assert record["original"]["attn_implementation"] == "sdpa"
    assert record["earlier_plans"] == [Plan(rope=YARN, attention="window:4").to_dict()]
    assert [layer["size"] for layer in record["attention"]] == [4] * 4
    assert [change.what for change in report.changes] == [
        "rope_parameters",
        "max_position_embeddings",
        "train_attention",
    ]
    extend(model, None, Plan(attention="full"))
    assert model.config.layer_types == stock.config.layer_types  # which is not what the layers see any more
    restore(model)
    assert torch.equal(model(IDS).logits, stock(IDS).logits)
    with pytest.raises(ValueError, match="no plan was applied"):
        restore(model)


@torch.no_grad()
def test_longrope_forgets_the_table_of_an_earlier_plan(tmp_path):
    model, ids = build("llama", torch.float32), tokens(1, 100)
    rope = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0]}
    extend(model, None, Plan(rope=rope))
    model(ids)  # a long text, for which the module keeps another table
    extend(model, None, Plan(rope={**rope, "long_factor": [1.0, 2.0, 4.0, 8.0]}))
    assert torch.equal(model(ids).logits, reload(model, tmp_path)(ids).logits)


@torch.no_grad()
def test_bfloat16_model_gets_float32_frequencies(tmp_path):
    model = build("llama", torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    extend(model, None, Plan(rope=YARN, attention="window:12"))
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(reload(model, tmp_path)(IDS).logits, model(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_without_attention_part_layers_keep_their_windows(family):
    model, stock = build(family), build(family)
    extend(model, None, Plan(rope=YARN))
    for name in ("sliding_window", "layer_types", "use_sliding_window", "_attn_implementation"):
        assert getattr(model.config, name, None) == getattr(stock.config, name, None)
    stock.config.rope_parameters = dict(model.config.rope_parameters)
    stock.model.rotary_emb = type(stock.model.rotary_emb)(config=stock.config)
    assert torch.equal(model(IDS).logits, stock(IDS).logits)


@torch.no_grad()
def test_tokens_come_with_the_rest(tmp_path):
    model, tokenizer = build("mistral", torch.float32), build_tokenizer()
    plan = Plan(rope=YARN, attention="full", tokens={"tokens": {"pad_token": "<pad>"}, "pad_to_multiple_of": 8})
    report = extend(model, tokenizer, plan)
    new = report.tokens.ids["<pad>"]
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id == new
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == report.tokens.rows[1]
    assert tokenizer.model_max_length == 256
    tokenizer.save_pretrained(tmp_path)
    again = reload(model, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("w1 <pad>")["input_ids"] == [4, new]
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_report_lists_what_tokens_change_in_the_configs():
    model, tokenizer = build("llama"), build_tokenizer()
    model.generation_config.eos_token_id = [2, 5]
    roles = {"eos_token": "<end>", "extra_special_tokens": ["<a>"]}
    report = extend(model, tokenizer, Plan(tokens={"tokens": roles, "pad_to_multiple_of": 64}))
    end = report.tokens.ids["<end>"]
    assert report.changes == [
        Change("vocab_size", 64, 128),
        Change("eos_token_id", 2, end),
        Change("generation_config.eos_token_id", [2, 5], [end, 5]),
    ]
    assert "no field of the config changes" not in str(report)
    # a row that was there already
    report = extend(model, tokenizer, Plan(tokens={"tokens": ["<b>"]}))
    assert report.changes == [] and model.config.vocab_size == 128


@torch.no_grad()
def test_meta_model_with_real_embeddings(tmp_path):
    real = build("qwen2", torch.float32)
    real.save_pretrained(tmp_path / "src")
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(build("llama").config)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight = nn.Parameter(torch.randn(module.weight.shape))
    twin = build("llama", torch.float32)
    plan = Plan(rope=YARN, attention="window:12, full", tokens={"tokens": ["<a>"]})
    report = extend(model, build_tokenizer(), plan)
    extend(twin, build_tokenizer(), plan)
    assert model.config.to_dict() == twin.config.to_dict()
    assert model.get_input_embeddings().weight.device.type == "cpu" and model.model.norm.weight.is_meta
    assert report.tokens.ids and len(report.proofs) == 3
    assert model.model.rotary_emb.inv_freq.device.type == "meta"


@torch.no_grad()
def test_bare_decoder_is_served():
    model = build("llama").model
    report = extend(model, None, Plan(rope=YARN, attention="window:4"))
    assert "4 layers attended by their patterns" in report.proofs[1]
    restore(model)
    assert torch.equal(model(IDS).last_hidden_state, build("llama").model(IDS).last_hidden_state)


def test_hooks_and_modes_survive():
    model = build("llama")
    calls = []
    model.model.rotary_emb.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    model.model.layers[1].eval()
    rotary = model.model.rotary_emb
    extend(model, None, Plan(rope=YARN, attention="window:4"))
    assert model.model.rotary_emb is rotary and model.training and not model.model.layers[1].training
    calls.clear()
    model(IDS)
    assert calls == [1]


def test_report_shows_before_and_after():
    model = build("mistral")
    report = extend(model, None, Plan(rope=YARN, attention="3 x window:4+sinks:1, 1 x full"))
    assert str(report) == "\n".join(
        [
            "what                                              before        after",
            "rope_parameters.rope_type                         default       yarn",
            "rope_parameters.factor                            -             4.0",
            "rope_parameters.original_max_position_embeddings  -             64",
            "max_position_embeddings                           64            256",
            "attention                                         4 x window:8  3 x window:4+sinks:1, full",
            "train_attention                                   4 x window:8  3 x window:4+sinks:1, full",
            "attn_implementation                               sdpa          longattn",
            "",
            "checked: 1 rotary module(s) turn by the config's frequencies",
            "checked: 4 layers attended by their patterns; caches keep the keys that they see",
        ]
    )
    assert json.loads(json.dumps(report.to_dict()))["changes"][1]["after"] == 256


def test_saved_config_names_the_implementation_for_any_reader(tmp_path):
    model = build("llama")
    extend(model, None, Plan(attention="window:4"))
    model.config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation == "longattn"


def test_plan_is_applied_again_where_another_implementation_took_its_place():
    model = build("llama")
    extend(model, None, Plan(attention="window:4"))
    expected = model(tokens(1, 20)).logits
    model.set_attn_implementation("sdpa")
    extend(model, None, Plan(attention="window:4"))
    assert torch.equal(model(tokens(1, 20)).logits, expected)


def test_limit_of_generation_follows_the_length_that_it_was(tmp_path):
    model = build("llama")
    model.generation_config.max_length = 64
    report = extend(model, None, Plan(rope=YARN))
    assert Change("generation_config.max_length", 64, 256) in report.changes
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.max_length == 256
    restore(loaded)
    assert loaded.generation_config.max_length == 64
    model = build("llama")
    model.generation_config.max_length = 50
    extend(model, None, Plan(rope=YARN))
    assert model.generation_config.max_length == 50


@torch.no_grad()
def test_layers_that_are_compiled_already_are_extended():
    torch._dynamo.reset()
    model, plain = (build("llama", torch.float32, num_hidden_layers=2) for _ in range(2))
    for layer in model.model.layers:
        layer.compile(backend="eager")
    ids = tokens(1, 20)
    model(ids)
    for changed in (model, plain):
        extend(changed, None, Plan(attention="window:4, full"))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
