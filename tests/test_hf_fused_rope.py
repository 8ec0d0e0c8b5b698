"""Fused rope against stock rotation where phases are small, and against float64 phases where they are large."""

import copy

import pytest
import torch
from hf_models import ALL_FAMILIES, build, tokens
from torch.testing import assert_close
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import longattn
from longattn.hf import use_fused_rope
from longattn.hf.rope import head_dim_of, rotary_modules
from longattn.rope import rope_layers

FAR = 10_000_000  # tokens; float32 phases are off by up to 0.5 there
# Stock modules form phases in float32; norms and softmax are float32 in float64 models too.
NEAR_RTOL = 1e-5
FLOAT32_RTOL = 3e-6
# How each stock rotary module lays out the table of its angles, which stock attention then reads.
TABLES = {
    "llama": lambda angles: torch.cat((angles, angles), -1),
    "gemma3_text": lambda angles: torch.cat((angles, angles), -1),
    "phi3": lambda angles: torch.cat((angles, angles), -1),
    "phi": lambda angles: torch.cat((angles, angles), -1),
    "gpt_neox": lambda angles: torch.cat((angles, angles), -1),
    "glm": lambda angles: torch.cat((angles, angles), -1),
    "gpt_oss": lambda angles: angles,
    "cohere": lambda angles: angles.repeat_interleave(2, -1),
}
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.3},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "dynamic": {"factor": 4.0},
    "proportional": {"partial_rotary_factor": 0.5},
}


def rope_of(rope_type):
    return {"rope_type": rope_type, "rope_theta": 1e4, **ROPES[rope_type]}


def relative(got, ref):
    got, ref = got.detach().double(), ref.detach().double()
    return float((got - ref).norm() / ref.norm())


def both(family, dtype=torch.float64, **fields):
    """A stock model and the same with fused rope."""
    stock = build(family, dtype, **fields)
    return stock, use_fused_rope(copy.deepcopy(stock))


def with_exact_phases(stock, layout):
    """A stock float64 model whose rotary modules' outputs are replaced by the definition in float64."""
    model = copy.deepcopy(stock).double()
    config = model.config

    def exact(module, args, kwargs, output):
        positions, *rest = (*args[1:], *kwargs.values())
        layers = rope_layers(config.rope_parameters)
        seen = {"max_position_embeddings": config.max_position_embeddings, "seq_len": int(positions.max()) + 1}
        inv_freq, scaling = longattn.rope_frequencies(layers[rest[0] if rest else None], head_dim_of(config), **seen)
        angles = layout(positions[..., None].double() * inv_freq)
        return angles.cos() * scaling, angles.sin() * scaling

    for _, module in rotary_modules(model):
        module.register_forward_hook(exact, with_kwargs=True)
    return model


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_logits_and_gradients_are_those_of_stock(family):
    stock, fused = both(family)
    ids = tokens(2, 21)
    ref, got = stock(ids, use_cache=False).logits, fused(ids, use_cache=False).logits
    assert 0 < relative(got, ref) < NEAR_RTOL
    ref.square().mean().backward()
    got.square().mean().backward()
    for (name, mine), its in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert (mine.grad is None) == (its.grad is None), name
        if mine.grad is not None:
            assert_close(mine.grad, its.grad, rtol=0, atol=NEAR_RTOL * float(its.grad.norm()) + 1e-12, msg=name)


@pytest.mark.parametrize("family", sorted(TABLES))
def test_far_positions_are_rotated_to_rounding_where_stock_is_not(family):
    stock, fused = both(family)
    ids, positions = tokens(1, 21), torch.arange(21)[None] + FAR
    call = dict(position_ids=positions, use_cache=False)
    exact = with_exact_phases(stock, TABLES[family])(ids, **call).logits
    assert relative(fused(ids, **call).logits, exact) < FLOAT32_RTOL
    assert relative(stock(ids, **call).logits, exact) > 100 * FLOAT32_RTOL
    stock32, fused32 = both(family, torch.float32)
    rounding = relative(stock32(ids, use_cache=False).logits, stock(ids, use_cache=False).logits)
    assert relative(fused32(ids, **call).logits, exact) < max(4 * rounding, FLOAT32_RTOL)


@pytest.mark.parametrize("rope_type", sorted(ROPES))
def test_rope_types_follow_stock_from_text_to_text(rope_type):
    stock, fused = both("llama", max_position_embeddings=32, rope_parameters=rope_of(rope_type))
    for length in (
        12,
        40,
        70,
        36,
        16,
        17,
        31,
        33,
    ):  # around both lengths: longrope's switch, dynamic's growth and reset
        ids = tokens(1, length)
        assert relative(fused(ids).logits, stock(ids).logits) < NEAR_RTOL, length
    exact = with_exact_phases(stock, TABLES["llama"])
    call = dict(position_ids=torch.arange(21)[None] + FAR, use_cache=False)
    ids = tokens(1, 21)
    assert relative(fused(ids, **call).logits, exact(ids, **call).logits) < FLOAT32_RTOL


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_layer_types_follow_their_own_lengths(rope_type):
    factors = [1.0 + i for i in range(8)]
    rope = rope_of(rope_type) | ({"short_factor": factors, "long_factor": factors[::-1]} if "long" in rope_type else {})
    ropes = {"sliding_attention": rope_of("default"), "full_attention": rope}
    stock, fused = both("gemma3_text", max_position_embeddings=32, rope_parameters=ropes)
    for length in (12, 40, 70, 20):
        ids = tokens(1, length)
        fresh = copy.deepcopy(stock)  # transformers before 5.21 runs one long text only with longrope in a layer type
        assert relative(fused(ids).logits, fresh(ids).logits) < NEAR_RTOL, length


def test_every_stock_rope_type_is_compared():
    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS}


def captured_rotation(model, ids, positions):
    """The first layer's query and key before and after their rotation, each (B, H, S, D)."""
    after, before = [], {}

    def capture(module, query, key, value, attention_mask, **kwargs):
        after.append((query, key))
        return value.repeat_interleave(module.num_key_value_groups, 1).transpose(1, 2), None

    AttentionInterface.register("capture", capture)
    model.set_attn_implementation("capture")
    first = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj"):
        getattr(first, name).register_forward_hook(
            lambda module, args, output, name=name: before.update({name: output})
        )
    model(ids, position_ids=positions, use_cache=False)
    heads = [before[name].unflatten(-1, (-1, first.head_dim)).transpose(1, 2) for name in ("q_proj", "k_proj")]
    return heads, after[0]


@pytest.mark.parametrize("start", [0, FAR])
def test_bfloat16_rounds_once(start):
    stock, fused = both("llama", torch.bfloat16, hidden_size=256)
    ids, positions = tokens(2, 64), torch.arange(64)[None] + start
    heads, got = captured_rotation(fused, ids, positions)
    _, its = captured_rotation(stock, ids, positions)
    angles = positions[0, :, None] * 1e4 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    for before, mine, stocks in zip(heads, got, its, strict=True):
        assert mine.dtype == torch.bfloat16
        a, b = before.double().chunk(2, -1)
        exact = torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)
        assert relative(mine, exact) <= relative(exact.bfloat16(), exact) * 1.01
        assert relative(stocks, exact) > 1.4 * relative(mine, exact)


def test_frequencies_outlive_casts_of_the_model():
    exact = use_fused_rope(build("llama", torch.float32)).model.rotary_emb
    cast_before = use_fused_rope(build("llama", torch.float32).to(torch.bfloat16)).model.rotary_emb
    cast_after = use_fused_rope(build("llama", torch.float32)).half().to(torch.bfloat16).model.rotary_emb
    positions = torch.tensor([[0, 1, FAR]])
    for rotary in (cast_before, cast_after):
        assert rotary.inv_freq.dtype == torch.bfloat16
        for mine, ref in zip(rotary(torch.zeros(1), positions), exact(torch.zeros(1), positions), strict=True):
            assert torch.equal(mine, ref)


def test_phases_travel_as_the_bits_of_the_exact_tables():
    rotary = use_fused_rope(build("llama")).model.rotary_emb
    positions = torch.tensor([[3, FAR]])
    for dtype, table in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        inv_freq, _ = longattn.rope_frequencies(rope_of("default"), 8)
        ref = longattn.rope_cos_sin(positions, inv_freq, dtype=table)
        for mine, its in zip(rotary(torch.zeros(1, dtype=dtype), positions), ref, strict=True):
            assert not mine.is_floating_point() and torch.equal(mine.view(table), its)


@pytest.mark.parametrize("family", ["gpt_neox", "glm", "stablelm"])
def test_channels_past_the_rotary_dim_pass_through(family):
    stock, fused = both(family)
    seen = []

    def capture(module, query, key, value, attention_mask, **kwargs):
        seen.append((query, key))
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("capture", capture)
    for model in (stock, fused):
        model.set_attn_implementation("capture")
        model(tokens(1, 9), use_cache=False)
    rotated = 2 * rotary_modules(stock)[0][1].inv_freq.numel()
    layers = len(seen) // 2
    for its, mine in zip(seen[0], seen[layers], strict=True):  # first layers: their inputs are equal
        assert rotated < mine.shape[-1]
        assert torch.equal(mine[..., rotated:], its[..., rotated:])
        assert_close(mine, its, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "gpt_oss", "cohere", "gpt_neox"])
def test_decoding_equals_prefill(family):
    fused = use_fused_rope(build(family))
    ids = tokens(2, 20)
    whole = fused(ids, use_cache=False).logits
    for cache in (DynamicCache(config=fused.config), StaticCache(config=fused.config, max_cache_len=24)):
        steps = [fused(ids[:, :11], past_key_values=cache).logits]
        for at in range(11, 20):
            steps.append(fused(ids[:, at : at + 1], past_key_values=cache).logits)
        assert relative(torch.cat(steps, 1), whole) < FLOAT32_RTOL


@pytest.mark.parametrize("family", ["llama", "cohere2"])
def test_left_padded_rows_equal_rows_alone(family):
    fused = use_fused_rope(build(family))
    rows = [tokens(1, 14, seed=1), tokens(1, 9, seed=2)]
    padded = torch.cat([rows[0], torch.cat([torch.zeros(1, 5, dtype=torch.long), rows[1]], 1)])
    mask = (padded != 0).long()
    got = fused(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    assert relative(got[0], fused(rows[0]).logits[0]) < FLOAT32_RTOL
    assert relative(got[1, 5:], fused(rows[1]).logits[0]) < FLOAT32_RTOL
    out = fused.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    alone = fused.generate(rows[1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out[1, 5:].tolist() == alone[0].tolist()
