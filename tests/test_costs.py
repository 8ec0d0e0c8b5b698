"""Cost formulas against counting: pairs by definition, caches by transformers' own, activations by autograd's."""

import doctest
import importlib

import pytest
import torch
from hf_models import build
from hypothesis import given
from hypothesis import strategies as st

import longattn
from longattn.costs import (
    AttentionLayer,
    Decoder,
    activation_bytes,
    decode_flops,
    prefill_flops,
    stock_mask_bytes,
)
from longattn.hf.caches import SMALLEST_SLACK, BandLayer
from longattn.pattern import Pattern
from longattn.structure import structure_of


@st.composite
def patterns(draw):
    kind = draw(st.sampled_from(["full", "window", "group"]))
    if kind == "full":
        return Pattern("full")
    size = draw(st.integers(1, 12))
    shift = draw(st.integers(0, size - 1)) if kind == "group" else 0
    return Pattern(kind, size, shift, draw(st.integers(0, 5)))


def seen(pattern, query, key, second_half):
    """Whether a query sees a key, by the definition of each pattern."""
    if key > query:
        return False
    if pattern.kind == "full" or key < pattern.sinks:
        return True
    if pattern.kind == "window":
        return query - key < pattern.size
    shift = pattern.shift if second_half else 0
    return (query + shift) // pattern.size == (key + shift) // pattern.size


@given(st.lists(patterns(), min_size=1, max_size=3), st.integers(1, 30))
def test_flops_are_four_a_channel_of_each_visible_pair(chosen, n):
    layers = [AttentionLayer(pattern, heads=4, kv_heads=2, head_dim=8) for pattern in chosen]
    pairs = [
        [sum(seen(pattern, i, j, head >= 2) for pattern in chosen for j in range(n) for head in range(4))]
        for i in range(n)
    ]
    assert prefill_flops(layers, n) == 4 * 8 * sum(row[0] for row in pairs)
    assert decode_flops(layers, n) == 4 * 8 * pairs[-1][0]


PLANS = {
    "stock": None,
    "narrow": "window:5",
    "wide": "window:16",
    "sinks": "window:5+sinks:2",
    "mixed": "2 x window:6, full, group:4+shift",
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("length", [1, 4, 5, 8, 21])
def test_kv_cache_bytes_are_what_a_real_cache_holds_but_for_its_slack(family, plan, length):
    model = build(family, torch.float32)
    if PLANS[plan] is not None:
        longattn.extend(model, None, longattn.Plan(attention=PLANS[plan]))
    with torch.no_grad():
        cache = model(torch.arange(length)[None] % 60, use_cache=True).past_key_values
        model(torch.tensor([[7]]), past_key_values=cache)  # a sliding cache is cut after each step
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 4
    model.config.dtype = torch.float32
    needed = structure_of(model.config, length + 1).costs.kv_cache_bytes
    layers_with_slack = sum(isinstance(layer, BandLayer) and layer.pattern.kind == "window" for layer in cache.layers)
    token = 2 * 2 * 8 * 4  # keys and values of 2 heads of 8 channels
    assert needed <= held <= needed + layers_with_slack * (SMALLEST_SLACK - 1) * token


def saved_bytes(model, length):
    """Bytes of the tensors that autograd keeps for a step's backward, each memory once, parameters not."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(length)[None] % 60
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels=ids, use_cache=False).loss
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_activation_bytes_are_what_autograd_keeps(dtype, kv_heads):
    sizes = dict(hidden_size=64, intermediate_size=160, num_key_value_heads=kv_heads, attn_implementation="sdpa")
    model = build("llama", dtype, **sizes).train()
    layers = tuple(AttentionLayer(Pattern("full"), 4, kv_heads, 16) for _ in range(4))
    decoder = Decoder(layers, 64, 160, 64, dtype.itemsize)
    assert activation_bytes(decoder, 200) == pytest.approx(saved_bytes(model, 200), rel=0.01)


@pytest.mark.parametrize("family", ["llama", "arcee", "gpt_neox", "gemma"])
def test_activation_bytes_hold_for_longattn_attention(family):
    model = build(family, torch.float32, hidden_size=64, intermediate_size=160)
    longattn.extend(model, None, longattn.Plan(attention="window:16"))
    model.config.dtype = torch.float32
    claimed = structure_of(model.config, 200).costs.activation_bytes
    assert claimed == pytest.approx(saved_bytes(model.train(), 200), rel=0.02)


def test_activation_bytes_with_checkpointing_are_inputs_and_one_layer():
    model = build("llama", torch.float32, hidden_size=64, intermediate_size=160).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})  # keeps the cosines and sines outside of autograd
    layers = tuple(AttentionLayer(Pattern("full"), 4, 2, 16) for _ in range(4))
    decoder, fewer = Decoder(layers, 64, 160, 64, 4), Decoder(layers[:3], 64, 160, 64, 4)
    one_layer = activation_bytes(decoder, 200) - activation_bytes(fewer, 200)
    tables = 200 * 2 * 16 * 4
    kept = activation_bytes(decoder, 200, checkpointing=True) - one_layer - tables
    assert kept == pytest.approx(saved_bytes(model, 200), rel=0.02)


def test_stock_mask_is_formed_where_a_window_hides_keys():
    layers = [AttentionLayer(Pattern(kind, size), 4, 2, 8) for kind, size in (("full", 0), ("window", 8))]
    assert stock_mask_bytes(layers, 8) == 0
    assert stock_mask_bytes(layers, 9) == 81
    assert stock_mask_bytes(layers[:1], 9) == 0


@pytest.mark.parametrize("name", ["costs", "plan", "rope_plan"])
def test_examples_in_docstrings_hold(name):
    results = doctest.testmod(importlib.import_module(f"longattn.{name}"))
    assert results.attempted > 0 and results.failed == 0
