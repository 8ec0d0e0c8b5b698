"""Rotary frequencies against transformers' own tables, built from its real configs and rotary modules."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn.rope import rope_frequencies, rope_layers, stock_parameters

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

EPS = 2.0**-23


def rotary(config, family, prefix=None):
    """The rotary module that the family's model builds from a config."""
    name = {"llama": "Llama", "phi3": "Phi3", "gpt_oss": "GptOss", "gemma3": "Gemma3", "gpt_neox": "GPTNeoX"}.get(
        family
    )
    name = name or {"gemma4": "Gemma4Text", "phimoe": "Phimoe", "hunyuan_v1_dense": "HunYuanDenseV1"}[family]
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["x"])
    return getattr(module, f"{name}RotaryEmbedding")(config)


def assert_same_table(inv_freq, stock, theta, amplify=1.0):
    """Equal to what float32 leaves of b^(-2i/d): the exponent's rounding times ln b, `amplify`-ed by a blend."""
    rtol = EPS * (2.0 + math.log(theta)) * amplify
    torch.testing.assert_close(inv_freq, stock.double(), rtol=rtol, atol=0.0)


def llama(rope, head_dim=64, length=4096):
    return transformers.LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=length,
        rope_parameters=dict(rope), num_hidden_layers=1, vocab_size=8, intermediate_size=8,
    )  # fmt: skip


def scaled(draw):
    """Rotary parameters of any stock type with the settings that go with them."""
    rope_type = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"]))
    rope = {"rope_type": rope_type, "rope_theta": draw(st.sampled_from([500.0, 1e4, 1e6, 8e6]))}
    if rope_type != "default":
        rope["factor"] = draw(st.floats(1.0, 64.0))
    if rope_type in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = draw(st.sampled_from([256, 2048, 8192]))
    if rope_type == "yarn":
        rope["truncate"] = draw(st.booleans())
        rope |= draw(st.sampled_from([{}, {"beta_fast": 16, "beta_slow": 2}, {"mscale": 0.7, "mscale_all_dim": 1.0}]))
    if rope_type == "llama3":
        rope |= {"low_freq_factor": draw(st.floats(0.5, 2.0)), "high_freq_factor": draw(st.floats(2.5, 8.0))}
    if rope_type == "proportional":
        rope["partial_rotary_factor"] = draw(st.sampled_from([0.25, 0.5, 1.0]))
    return rope


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_every_stock_type_equals_transformers(data):
    rope = scaled(data.draw)
    head_dim = data.draw(st.sampled_from([8, 32, 64, 96, 128, 256]))
    length = data.draw(st.sampled_from([4096, 16384]))
    seq_len = data.draw(st.sampled_from([None, 128, 5000, 100_000]))
    if rope["rope_type"] == "longrope":
        values = st.lists(st.floats(1.0, 64.0), min_size=head_dim // 2, max_size=head_dim // 2)
        rope |= {"short_factor": data.draw(values), "long_factor": data.draw(values)}
    config = llama(rope, head_dim, length)
    if rope["rope_type"] == "default":
        stock, stock_scaling = rotary(config, "llama").compute_default_rope_parameters(config)
    else:
        table = rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        stock, stock_scaling = table(config, "cpu", seq_len=seq_len)
    inv_freq, scaling = rope_frequencies(rope, head_dim, max_position_embeddings=length, seq_len=seq_len)
    blends = rope["rope_type"] in ("yarn", "llama3")
    stretched = rope["rope_theta"] * (4096 * 64.0 if rope["rope_type"] == "dynamic" else 1.0)
    assert_same_table(inv_freq, stock, stretched, amplify=4 * rope["factor"] if blends else 1.0)
    assert scaling == pytest.approx(stock_scaling, rel=1e-14)


@settings(deadline=None, max_examples=40)
@given(
    rope_type=st.sampled_from(["ntk", "by-parts"]), factor=st.floats(1.0, 32.0), head_dim=st.sampled_from([32, 80, 128])
)
def test_stock_forms_make_transformers_build_the_same_frequencies(rope_type, factor, head_dim):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": 4096}
    module = rotary(llama(stock_parameters(rope, head_dim), head_dim), "llama")
    inv_freq, scaling = rope_frequencies(rope, head_dim)
    assert_same_table(inv_freq, module.inv_freq, 1e4 * factor, amplify=4 * factor if rope_type == "by-parts" else 1.0)
    assert module.attention_scaling == scaling == 1.0


def test_phi3_longrope_takes_the_factor_from_the_lengths():
    rope = {
        "type": "longrope",
        "short_factor": [1.0 + i / 8 for i in range(12)],
        "long_factor": [2.0 + i for i in range(12)],
    }
    config = transformers.Phi3Config(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=131072, original_max_position_embeddings=4096,
        rope_scaling=rope, partial_rotary_factor=0.75, vocab_size=8, num_hidden_layers=1, pad_token_id=0,
    )  # fmt: skip
    module = rotary(config, "phi3")
    inv_freq, scaling = rope_frequencies(config.rope_parameters, 32, max_position_embeddings=131072)
    assert_same_table(inv_freq, module.inv_freq, 1e4)
    assert scaling == pytest.approx(module.attention_scaling, rel=1e-14)
    assert scaling > 1.0
    module(torch.zeros(1), torch.tensor([[4096]]))  # one token past the original length
    inv_freq, _ = rope_frequencies(config.rope_parameters, 32, max_position_embeddings=131072, seq_len=4097)
    assert_same_table(inv_freq, module.inv_freq, 1e4)


def test_gpt_oss_yarn_without_truncation():
    config = transformers.GptOssConfig(num_hidden_layers=1, vocab_size=8)
    assert config.rope_parameters["truncate"] is False
    module = rotary(config, "gpt_oss")
    inv_freq, scaling = rope_frequencies(config.rope_parameters, config.head_dim)
    assert_same_table(inv_freq, module.inv_freq, 150_000.0, amplify=4 * 32.0)
    assert scaling == pytest.approx(module.attention_scaling, rel=1e-14)


def test_gemma3_layer_types_have_tables_of_their_own():
    config = transformers.Gemma3TextConfig(num_hidden_layers=6, rope_scaling={"rope_type": "linear", "factor": 8.0})
    module = rotary(config, "gemma3")
    layers = rope_layers(config.rope_parameters)
    assert set(layers) == {"full_attention", "sliding_attention"}
    for layer_type, rope in layers.items():
        inv_freq, _ = rope_frequencies(rope, config.head_dim)
        assert_same_table(inv_freq, getattr(module, f"{layer_type}_inv_freq"), rope["rope_theta"])


def test_gemma4_layer_types_have_head_dims_of_their_own():
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this transformers has no Gemma 4")
    config = transformers.Gemma4TextConfig(num_hidden_layers=6)
    module = rotary(config, "gemma4")
    for layer_type, rope in rope_layers(config.rope_parameters).items():
        stock = getattr(module, f"{layer_type}_inv_freq")
        inv_freq, _ = rope_frequencies(rope, 2 * stock.numel())
        assert_same_table(inv_freq, stock, rope["rope_theta"])
        assert (inv_freq == 0).any() == (layer_type == "full_attention")


def test_gpt_neox_rotates_a_part_of_the_head():
    config = transformers.GPTNeoXConfig(hidden_size=256, num_attention_heads=4, rotary_pct=0.25, num_hidden_layers=1)
    module = rotary(config, "gpt_neox")
    assert_same_table(rope_frequencies(config.rope_parameters, 64)[0], module.inv_freq, 1e4)
    assert module.inv_freq.numel() == 8


def test_hunyuan_dynamic_with_alpha_is_static():
    config = transformers.HunYuanDenseV1Config(
        hidden_size=64, num_attention_heads=2, head_dim=32, num_hidden_layers=1, vocab_size=8,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0},
    )  # fmt: skip
    module = rotary(config, "hunyuan_v1_dense")
    inv_freq, _ = rope_frequencies(config.rope_parameters, 32, max_position_embeddings=2048, seq_len=100_000)
    assert_same_table(inv_freq, module.inv_freq, 1e7)


# Where transformers is wrong


def nested_llama(rope):
    """What transformers' tables read of a config, with rope parameters per layer type."""
    config = SimpleNamespace(rope_parameters={"full_attention": dict(rope)}, head_dim=64, max_position_embeddings=4096)
    config.hidden_size, config.num_attention_heads, config.per_layer_config = 64, 1, {"full_attention": config}
    config.standardize_rope_params = lambda: None
    return config


def test_nested_yarn_heeds_its_own_truncate():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 4096}
    rope["truncate"] = False
    flat, _ = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](llama(rope), "cpu")
    nested, _ = rope_frequencies(rope_layers({"full_attention": rope})["full_attention"], 64)
    assert_same_table(nested, flat, 1e4, amplify=32.0)
    stock, _ = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](nested_llama(rope), "cpu", layer_type="full_attention")
    truncated, _ = rope_frequencies({**rope, "truncate": True}, 64)
    assert not torch.allclose(nested, truncated, rtol=1e-4, atol=0.0)
    # transformers reads the outer dict here; the day it doesn't, its table is ours
    assert torch.allclose(stock.double(), truncated, rtol=1e-4, atol=0.0) or torch.allclose(stock.double(), nested)


def test_nested_longrope_serves_long_sequences():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    rope |= {"short_factor": [1.0] * 32, "long_factor": [1.0 + i for i in range(32)]}
    layer = rope_layers({"full_attention": rope, "sliding_attention": {"rope_theta": 1e4}})["full_attention"]
    flat, flat_scaling = rope_utils.ROPE_INIT_FUNCTIONS["longrope"](llama(rope, length=512), "cpu", seq_len=129)
    inv_freq, scaling = rope_frequencies(layer, 64, seq_len=129)
    assert_same_table(inv_freq, flat, 1e4)
    assert scaling == pytest.approx(flat_scaling, rel=1e-14)
