"""What a plan's rope and context make of a config's, against transformers' own reading of the result."""

import copy
import logging

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longattn.rope import SAVED_TYPES, rope_frequencies
from longattn.rope_plan import resolve_rope

HEAD_DIM = 64
LENGTH = 4096
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4096}
TYPES = ["linear", "ntk", "dynamic", "by-parts", "yarn", "llama3"]


def resolve(current=PLAIN, length=LENGTH, rope=None, context=None, **options):
    before = copy.deepcopy((current, rope))
    change = resolve_rope(current, length, rope, context, HEAD_DIM, **options)
    assert (current, rope) == before
    assert type(change.max_position_embeddings) is int
    return change


def stock_config(change):
    """transformers' config and rotary module of a change; its validation must find nothing to say."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(handler)
    try:
        config = LlamaConfig(
            hidden_size=HEAD_DIM,
            num_attention_heads=1,
            max_position_embeddings=change.max_position_embeddings,
            rope_parameters=copy.deepcopy(change.rope_parameters),
        )
    finally:
        logger.removeHandler(handler)
    assert said == []
    assert config.rope_parameters == change.rope_parameters
    return config, LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("rope_type", TYPES)
@pytest.mark.parametrize("given_as", ["factor", "context", "both"])
def test_rope_of_each_type_is_what_transformers_computes(rope_type, given_as):
    rope = {"rope_type": rope_type} | ({} if given_as == "context" else {"factor": 8})
    change = resolve(rope=rope, context=None if given_as == "factor" else 8 * LENGTH)
    assert change.rope_parameters["rope_type"] in SAVED_TYPES
    assert change.max_position_embeddings == (LENGTH if rope_type == "dynamic" else 8 * LENGTH)
    _, module = stock_config(change)
    wanted = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LENGTH,
        **PLAIN,
        **rope,
        "factor": 8.0,
    }
    inv_freq, scaling = rope_frequencies(wanted, HEAD_DIM, max_position_embeddings=LENGTH)
    torch.testing.assert_close(module.inv_freq.double(), inv_freq, rtol=1e-5, atol=0)
    assert module.attention_scaling == pytest.approx(scaling, rel=1e-6)


@pytest.mark.parametrize("rope_type", TYPES)
def test_rope_keeps_theta_and_partial_rotary_factor(rope_type):
    current = {**PLAIN, "partial_rotary_factor": 0.5, "mrope_section": [4, 6, 6]}
    new = resolve(current, rope={"rope_type": rope_type, "factor": 2}).rope_parameters
    assert new["partial_rotary_factor"] == 0.5
    assert new["mrope_section"] == [4, 6, 6]
    expected = 5e5 * 2 ** (32 / 30) if rope_type == "ntk" else 5e5
    assert new["rope_theta"] == pytest.approx(expected, rel=1e-12)


def test_theta_alone_needs_context():
    with pytest.raises(ValueError, match="rope_type 'default' without a factor needs context"):
        resolve(rope={"rope_theta": 8e6})
    change = resolve(rope={"rope_theta": 8e6}, context=32768)
    assert change.rope_parameters == {"rope_type": "default", "rope_theta": 8e6}
    assert change.max_position_embeddings == 32768


def test_longrope_takes_lists_and_keeps_old_length():
    lists = {"short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
    change = resolve(rope={"rope_type": "longrope", **lists}, context=4 * LENGTH)
    expected = {**PLAIN, **lists, "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": LENGTH}
    assert change.rope_parameters == expected
    stock_config(change)


@pytest.mark.parametrize("rope", [{"factor": 2}, {"rope_type": "yarn", "factor": 2}, {"rope_type": "yarn"}, None])
def test_factor_multiplies_where_type_stays(rope):
    needs_context = rope is None or "factor" not in rope
    change = resolve(YARN, 16384, rope, 32768 if needs_context else None)
    assert change.rope_parameters == {**YARN, "factor": 8.0}
    assert change.max_position_embeddings == 32768
    stock_config(change)


def test_factor_multiplies_for_every_scaled_type():
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert resolve(linear, 8192, {"factor": 3}).rope_parameters["factor"] == 6.0
    dynamic = {**linear, "rope_type": "dynamic"}
    change = resolve(dynamic, 8192, {"factor": 3})
    assert (change.rope_parameters["factor"], change.max_position_embeddings) == (6.0, 8192)
    # "dynamic" reaches factor times its length
    assert resolve(dynamic, 8192, None, 32768).rope_parameters["factor"] == 4.0
    llama3 = {**YARN, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    change = resolve(llama3, 131072, {"factor": 2})  # Llama 3.1 claims 32 times its original length, with factor 8
    assert (change.rope_parameters["factor"], change.max_position_embeddings) == (16.0, 262144)


def test_ntk_after_ntk_multiplies():
    once = resolve(rope={"rope_type": "ntk", "factor": 2})
    twice = resolve(once.rope_parameters, once.max_position_embeddings, {"rope_type": "ntk", "factor": 3})
    direct = resolve(rope={"rope_type": "ntk", "factor": 6})
    assert twice.max_position_embeddings == direct.max_position_embeddings
    assert twice.rope_parameters["rope_theta"] == pytest.approx(direct.rope_parameters["rope_theta"], rel=1e-12)


def test_by_parts_goes_on_where_yarn_is_stored():
    once = resolve(rope={"rope_type": "by-parts", "factor": 2})
    twice = resolve(once.rope_parameters, once.max_position_embeddings, {"rope_type": "by-parts", "factor": 2})
    assert twice == resolve(rope={"rope_type": "by-parts", "factor": 4})


def test_yarn_that_was_only_turned_on_counts_from_what_it_reaches():
    change = resolve(YARN, 4096, {"factor": 2})  # max_position_embeddings is still the original length
    assert (change.rope_parameters["factor"], change.max_position_embeddings) == (8.0, 32768)
    stock_config(change)


def test_another_type_is_refused_and_shown():
    with pytest.raises(
        ValueError, match="scaled already, .*'factor': 4.0.* rope_type 'linear' can only take its place"
    ):
        resolve(YARN, 16384, {"rope_type": "linear", "factor": 2})


def test_another_type_counts_from_the_original_length_that_a_plan_gives():
    current = {**YARN, "beta_fast": 16.0, "attention_factor": 1.2, "partial_rotary_factor": 1.0}
    plan = {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 4096}
    change = resolve(current, 16384, plan)
    assert change.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 1e6,
        "partial_rotary_factor": 1.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4096,
    }
    assert change.max_position_embeddings == 32768
    stock_config(change)
    dynamic = resolve(current, 16384, {**plan, "rope_type": "dynamic"})
    assert dynamic.max_position_embeddings == 4096
    assert "original_max_position_embeddings" not in dynamic.rope_parameters
    back = resolve(YARN, 16384, {"rope_type": "default", "original_max_position_embeddings": 4096}, 4096)
    assert (back.rope_parameters, back.max_position_embeddings) == ({"rope_type": "default", "rope_theta": 1e6}, 4096)


NESTED = {"sliding_attention": {**PLAIN, "rope_theta": 1e4}, "full_attention": PLAIN, "linear_attention": None}


def test_flat_plan_goes_to_full_attention_only():
    change = resolve(NESTED, rope={"rope_type": "linear", "factor": 4})
    assert change.rope_parameters == {
        **NESTED,
        "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
    }
    assert list(change.rope_parameters) == list(NESTED)
    assert change.max_position_embeddings == 4 * LENGTH


def test_nested_plan_names_layer_types():
    rope = {
        "sliding_attention": {"rope_type": "ntk", "factor": 2},
        "full_attention": {"rope_type": "yarn", "factor": 8},
    }
    change = resolve(NESTED, rope=rope)
    assert change.max_position_embeddings == 8 * LENGTH
    assert change.rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert change.rope_parameters["sliding_attention"]["rope_theta"] > 1e4
    with pytest.raises(ValueError, match="names the layer type 'linear_attention', the model's with rope are"):
        resolve(NESTED, rope={"linear_attention": {"rope_type": "linear", "factor": 2}})
    with pytest.raises(ValueError, match="one rope for all layers"):
        resolve(rope=rope)


def test_layers_that_see_everything_decide_the_length():
    sliding = {"sliding_attention": {"rope_type": "linear", "factor": 2}}
    change = resolve(NESTED, rope=sliding)
    assert change.max_position_embeddings == LENGTH and change.rope_parameters["full_attention"] == PLAIN
    with pytest.raises(ValueError, match="context is the length of the layers that see everything"):
        resolve(NESTED, rope=sliding, context=2 * LENGTH)
    windowed = {"sliding_attention": PLAIN, "chunked_attention": PLAIN}
    change = resolve(windowed, rope=sliding)
    assert change.max_position_embeddings == 2 * LENGTH
    with pytest.raises(ValueError, match="gives the layer types different lengths"):
        resolve(windowed, rope={**sliding, "chunked_attention": {"rope_type": "linear", "factor": 4}})


def test_other_layers_keep_their_frequencies():
    dynamic = {**NESTED, "sliding_attention": {**PLAIN, "rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(ValueError, match=f"it would be {4 * LENGTH} where {LENGTH} is meant"):
        resolve(dynamic, rope={"rope_type": "linear", "factor": 4})


def test_rotary_dim_stays():
    with pytest.raises(ValueError, match="changes the rotary dim, 64, to 32"):
        resolve(rope={"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5})


def test_older_configs_are_read():
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4}
    change = resolve(old, 8192, {"factor": 2})
    assert change.rope_parameters == {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert change.max_position_embeddings == 16384


def test_lengths_are_whole_and_yarn_agrees_with_them():
    change = resolve(rope={"rope_type": "yarn", "factor": 1.1})
    assert change.max_position_embeddings == 4506
    assert change.rope_parameters["factor"] == 4506 / 4096
    stock_config(change)


def test_context_alone_raises_length_only_where_asked():
    with pytest.raises(ValueError, match="context alone changes no rotary frequency"):
        resolve(context=8192)
    change = resolve(context=8192, length_only=True)
    assert (change.rope_parameters, change.max_position_embeddings) == (PLAIN, 8192)
    with pytest.raises(ValueError, match="changes no rotary frequency"):
        resolve(context=LENGTH, length_only=True)


REFUSED = [
    ({"rope_type": "yarn"}, None, "'yarn' needs a factor, or context to compute it from"),
    ({"factor": 8}, None, "rope_type 'default' has no key 'factor'"),
    ({"rope_type": "yarn", "factor": 8}, 16384, "factor 8 times 4096 tokens is 32768, but context is 16384"),
    ({"rope_type": "yarn"}, 2048, "context must be at least the present 4096 tokens, got 2048"),
    ({"rope_type": "linear", "factor": 1}, None, "changes no rotary frequency"),
    ({"rope_type": "default"}, LENGTH, "changes no rotary frequency"),
    ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4.0}, None, "high_freq_factor'.* must be above"),
    ({"rope_type": "longrope", "factor": 8}, None, "needs 'short_factor'"),
    ({"rope_type": "longrope", "factor": 8, "short_factor": [1.0], "long_factor": [2.0]}, None, "must have 32 numbers"),
]


@pytest.mark.parametrize(("rope", "context", "message"), REFUSED)
def test_rope_is_refused_with_reason(rope, context, message):
    with pytest.raises(ValueError, match=message):
        resolve(rope=rope, context=context)


def test_rope_without_theta_is_refused():
    with pytest.raises(ValueError, match="needs 'rope_theta'"):
        resolve({"rope_type": "default"}, rope={"rope_type": "yarn", "factor": 2})


@settings(deadline=None)
@given(st.data())
def test_any_plan_twice_is_stock_or_refused(data):
    types = st.sampled_from([*TYPES, "proportional", "default"])
    plans = st.fixed_dictionaries(
        {},
        optional={
            "rope_type": types,
            "factor": st.sampled_from([1, 1.5, 2, 3.7, 8]),
            "rope_theta": st.sampled_from([1e4, 1e7]),
            "original_max_position_embeddings": st.sampled_from([1000, 4096, 9999]),
            "beta_fast": st.sampled_from([16, 48.0]),
            "attention_factor": st.sampled_from([1, 1.3]),
        },
    )
    current, length = PLAIN, LENGTH
    for _ in range(2):
        context = data.draw(st.none() | st.sampled_from([4096, 10000, 65536]))
        try:
            change = resolve(current, length, data.draw(plans) or None, context)
        except ValueError:
            continue
        current, length = change.rope_parameters, change.max_position_embeddings
        assert current["rope_type"] in SAVED_TYPES
        assert current["rope_theta"] >= 1e4
        inv_freq, scaling = rope_frequencies(current, HEAD_DIM, max_position_embeddings=length, seq_len=length)
        assert bool(inv_freq.isfinite().all()) and scaling > 0
