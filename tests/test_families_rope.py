"""Where families keep their rope in ways of their own: by layer type, in part of a head, twice, in some layers only."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from hf_models import LLAMA3, build, rope_plans, tokens
from transformers import AutoModelForCausalLM, Phi3ForCausalLM

from longattn.hf.rope import LAYERED_LONGROPE, check_rotary_modules
from longattn.plan import Plan
from longattn.structure import structure_of
from longattn.surgery import extend, restore

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0}
NESTED = ("gemma3_text", "olmo3")
# families whose stored rope is plain, and the angles of their heads: a part, all, by layer type
ANGLES = {"gpt_neox": 2, "phi": 2, "stablelm": 2, "glm": 2, "cohere": 4, "mixtral": 4, "gemma3_text": 8, "olmo3": 4}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
IDS, LONG_IDS = tokens(2, 40), tokens(1, 100)


def reload(model, path):
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", experts_implementation="eager").eval()


@pytest.mark.parametrize("family", ANGLES)
@torch.no_grad()
def test_every_rope_type_reloads_bit_for_bit(family, tmp_path):
    stock = build(family, torch.float32)
    expected = stock(IDS).logits
    for rope in rope_plans(ANGLES[family]):
        model = copy.deepcopy(stock)
        if rope["rope_type"] == "longrope" and family in NESTED and not LAYERED_LONGROPE:
            with pytest.raises(ValueError, match="longrope needs transformers 5.21, got 5"):
                extend(model, None, Plan(rope=rope))
            continue
        extend(model, None, Plan(rope=rope))
        long = model(LONG_IDS).logits
        assert not torch.equal(long, stock(LONG_IDS).logits), rope
        again = reload(model, tmp_path / str(rope["rope_type"]))
        for ids in (LONG_IDS, IDS):
            assert torch.equal(again(ids).logits, model(ids).logits), rope
        for changed in (model, again):
            changed(LONG_IDS)  # dynamic and longrope remember it
            restore(changed)
            assert torch.equal(changed(IDS).logits, expected), rope
        saved = {"dtype": "float32", "architectures": [type(stock).__name__]}
        assert model.config.to_dict() == {**stock.config.to_dict(), **saved}


@pytest.mark.parametrize("family", NESTED)
def test_a_flat_rope_goes_to_the_layers_that_see_everything(family):
    model = build(family)
    before = copy.deepcopy(model.config.rope_parameters)
    extend(model, None, Plan(rope=YARN))
    after = model.config.rope_parameters
    assert after["sliding_attention"] == before["sliding_attention"]
    assert after["full_attention"]["factor"] == 4.0 and model.config.max_position_embeddings == 256
    assert [layer.rope_type for layer in structure_of(model.config, 64).layers] == ["default", "yarn"] * 2


@pytest.mark.parametrize("family", NESTED)
def test_a_rope_that_stays_where_layers_see_more_is_noted(family):
    nested = {"sliding_attention": YARN, "full_attention": YARN}
    for attention in ("full", "window:9", "window:8+sinks:1", "group:9"):
        model = build(family)
        (note,) = extend(model, None, Plan(rope=YARN, attention=attention)).notes
        assert note.startswith("2 layer(s) of type sliding_attention, the first of them layer 0, see beyond their own ")
        assert "window of 8 tokens, but keep their rope, default: " in note
        assert "--rope sliding_attention.rope_type=... --rope sliding_attention.factor=..." in note
        assert extend(build(family), None, Plan(rope=nested, attention=attention)).notes == []
        assert extend(build(family), None, Plan(attention=attention)).notes == []
    for attention in (None, "window:8, full", "group:8, full"):
        assert extend(build(family), None, Plan(rope=YARN, attention=attention)).notes == []
    bounded = Plan(context=256, attention="window:9")  # changes no rope
    assert extend(build(family), None, bounded).notes == []
    # one plan after the other, and in training alone
    model = build(family)
    assert extend(model, None, Plan(rope=YARN)).notes == []
    assert extend(model, None, Plan(train_attention="full")).notes[0].startswith("2 layer(s) of type sliding_attention")
    assert extend(build("gemma2"), None, Plan(rope=YARN, attention="full")).notes == []


@pytest.mark.parametrize("family", NESTED)
def test_a_rope_of_windowed_layers_alone_leaves_the_length(family):
    model = build(family)
    before = copy.deepcopy(model.config.rope_parameters)
    sliding = {"sliding_attention": {"rope_type": "ntk", "factor": 2.0}}
    with pytest.raises(ValueError, match="so that rope must name 'full_attention' too"):
        extend(model, None, Plan(rope=sliding, context=128))
    extend(model, None, Plan(rope=sliding))
    assert model.config.max_position_embeddings == 64
    assert model.config.rope_parameters["full_attention"] == before["full_attention"]
    assert model.config.rope_parameters["sliding_attention"]["rope_theta"] > before["sliding_attention"]["rope_theta"]
    assert "1 rotary module(s)" in check_rotary_modules(model)


def test_ropes_that_would_move_those_of_other_layers_are_refused():
    dynamic = {"sliding_attention": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(ValueError, match=r"'sliding_attention'\] of type 'dynamic' depends on max_position_embeddings"):
        extend(build("gemma3_text"), None, Plan(rope={**dynamic, "full_attention": YARN}))
    model = build("gemma3_text")
    extend(model, None, Plan(rope=dynamic))
    assert model.config.max_position_embeddings == 64
    with pytest.raises(ValueError, match="it would be 256 where 64 is meant"):
        extend(model, None, Plan(rope=YARN))


def test_what_transformers_would_read_otherwise_is_refused():
    with pytest.raises(ValueError, match="truncate'] must be true, got False"):
        extend(build("olmo3"), None, Plan(rope={**YARN, "truncate": False}))
    for rope in (YARN, {"rope_type": "linear", "factor": 2.0}):
        with pytest.raises(ValueError, match="a phi3 config only takes the rope types default, longrope .*, got"):
            extend(build("phi3", rope_parameters=PLAIN), None, Plan(rope=rope))
    for family in ("llama", "gpt_neox"):
        with pytest.raises(ValueError, match="changes the rotary dim, "):
            extend(build(family), None, Plan(rope={**YARN, "partial_rotary_factor": 0.25}))


@torch.no_grad()
def test_phi3_keeps_its_original_length_in_both_places(tmp_path):
    stock = build("phi3", torch.float32)
    model = copy.deepcopy(stock)
    extend(model, None, Plan(rope={"factor": 2.0, "long_factor": [3.0, 5.0]}))
    assert model.config.max_position_embeddings == 128 and model.config.original_max_position_embeddings == 32
    # one that has never been scaled, whose config says another original length
    plain = build("phi3", torch.float32, rope_parameters=PLAIN, original_max_position_embeddings=4096)
    extend(plain, None, Plan(rope={"rope_type": "longrope", "factor": 4.0, **FACTORS}))
    assert plain.config.original_max_position_embeddings == 64 and plain.config.max_position_embeddings == 256
    for index, changed in enumerate((model, plain)):
        again = reload(changed, tmp_path / str(index))
        for ids in (LONG_IDS, IDS):
            assert torch.equal(again(ids).logits, changed(ids).logits)
    # the factor that its config leaves to the two lengths
    assert stock.model.rotary_emb.attention_scaling < model.model.rotary_emb.attention_scaling
    restore(plain)
    assert plain.config.original_max_position_embeddings == 4096


@pytest.mark.parametrize(
    "plan",
    [
        dict(rope={"factor": 2.0}),
        dict(rope={"rope_type": "longrope", "short_factor": [2.0, 2.0]}, context=128),
        dict(rope={"factor": 4.0, "original_max_position_embeddings": 32}),
        dict(context=128),
        dict(context=128, attention="window:12"),
    ],
)
def test_a_longer_longrope_needs_a_new_list(plan):
    model = build("phi3")
    error = "the checkpoint's long_factor serves 64 tokens.* for 128 tokens the plan must give a new long_factor, got "
    with pytest.raises(ValueError, match=error + ("{" if "rope" in plan else "context alone")):
        extend(model, None, Plan(**plan))
    extend(model, None, Plan(**{**plan, "rope": {**plan.get("rope", {}), "long_factor": [3.0, 5.0]}}))
    assert model.config.max_position_embeddings == 128 and model.config.rope_parameters["long_factor"] == [3.0, 5.0]


@pytest.mark.skipif(
    "next_sequence_length" not in inspect.getsource(Phi3ForCausalLM.prepare_inputs_for_generation),
    reason="this transformers gives Phi-3 its last token alone where it drops the cache",
)
@torch.no_grad()
def test_phi3_generates_across_the_switch_of_its_tables():
    model = build("phi3")
    extend(model, None, Plan(rope={"factor": 2.0, "long_factor": [3.0, 5.0]}, attention="window:12+sinks:2, full"))
    ids = tokens(1, 28)
    greedy = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    for cache in (None, "static"):
        got = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=cache, **greedy)
        expected = [model(got[:, :end], use_cache=False).logits[0, -1].argmax() for end in range(28, 38)]
        assert got[0, 28:].tolist() == [int(token) for token in expected]


@torch.no_grad()
def test_scaled_checkpoints_are_scaled_further():
    for family, rope in {"gpt_oss": dict(truncate=False), "cwm": LLAMA3}.items():
        model = build(family)
        extend(model, None, Plan(context=256))
        parameters = model.config.rope_parameters
        assert parameters["factor"] == 8.0 and parameters["original_max_position_embeddings"] == 32
        assert all(parameters[key] == value for key, value in rope.items() if key != "factor")


def test_context_alone_serves_where_every_layer_that_rotates_is_bounded():
    model = build("cohere2")  # rotates where it has a window, and sees everything where it does not rotate
    extend(model, None, Plan(context=512))
    assert model.config.max_position_embeddings == 512
    assert [layer.rope_type for layer in structure_of(model.config, 64).layers] == ["default", "none"] * 2
    extend(build("mistral"), None, Plan(context=512))
    with pytest.raises(ValueError, match="context alone changes no rotary frequency"):
        extend(build("smollm3"), None, Plan(context=512))
    model = build("smollm3")
    extend(model, None, Plan(context=512, attention="window:9, full, window:9, window:9"))
    assert [layer.rope_type for layer in structure_of(model.config, 64).layers] == ["default", "none", *["default"] * 2]


def test_a_rope_that_no_layer_turns_by_is_refused():
    model = build("gemma3_text", layer_types=["sliding_attention"] * 4)
    with pytest.raises(ValueError, match="rope changes 'full_attention', but no layer of the model is of that type"):
        extend(model, None, Plan(rope=YARN))


def test_two_way_attention_is_refused():
    for family in ("gemma2", "gemma3_text"):
        with pytest.raises(ValueError, match="use_bidirectional_attention True"):
            extend(build(family, use_bidirectional_attention=True), None, Plan(rope=YARN))
