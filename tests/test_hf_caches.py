"""What caches hold and what they show: decoding far past the window, in every order that transformers decodes in."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from cache_helpers import LONG, PLANS, extended, held_tokens, padded, stepwise
from hf_models import FAMILIES, LAYERS, assert_agree, build, masked, tokens, under_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, StaticCache

from longattn.hf.caches import BandLayer
from longattn.pattern import Pattern, parse_patterns
from longattn.plan import Plan
from longattn.surgery import extend


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("padding", [None, [0, 30], [3, 149], [2, 5]])
@torch.no_grad()
def test_decoding_far_past_the_window_agrees_with_dense(plan, padding):
    model, dense = extended(plan)
    ids, mask, positions, start = padded(padding or [0, 0])
    if padding is None:
        expected, mask, positions = masked(dense, ids), None, None
    else:
        expected = masked(dense, ids, position_ids=positions, kv_start=start)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    cache = DynamicCache(config=model.config)
    got = stepwise(model, ids, mask, positions, cache, [0, 11, 12, 13, *range(40, 60), 100, *range(101, LONG + 1)])
    assert_agree(got[real], expected[real])
    assert cache.get_seq_length() == LONG


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("padded_row", [False, True])
@torch.no_grad()
def test_memory_stays_flat(plan, padded_row):
    model, _ = extended(plan)
    ids, mask, positions, _ = padded([4 * padded_row, 0])
    cache, most = DynamicCache(config=model.config), [0] * LAYERS
    for end in range(100, LONG + 1):
        part = slice(0 if end == 100 else end - 1, end)
        model(ids[:, part], attention_mask=mask[:, :end], position_ids=positions[:, part], past_key_values=cache)
        most = [max(a, b) for a, b in zip(most, held_tokens(cache), strict=True)]
        for layer in cache.layers:
            assert layer.keys.untyped_storage().nbytes() <= layer.keys.nbytes * 1.01  # no part of a longer tensor
    for pattern, held in zip(parse_patterns(plan, LAYERS), most, strict=True):
        if pattern.kind == "full":
            assert held == LONG
        elif pattern.kind == "window":
            assert held < pattern.size + pattern.sinks + max(16, pattern.size // 8)
        else:
            assert held < 3 * pattern.size


@torch.no_grad()
def test_dropped_keys_are_freed_at_once():
    model, _ = extended("window:20+sinks:3")
    whole = []

    def note(module, args, kwargs):
        held = kwargs["cache" if "cache" in kwargs else "past_key_values"]  # transformers 5.24 renamed it
        layer = held.layers[module.layer_idx]
        update = type(layer).update

        def watch(*given, **more):
            shown = update(layer, *given, **more)
            whole.append(weakref.ref(layer.keys))
            return shown

        layer.update = watch

    hooks = [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in model.model.layers]
    gc.disable()  # a cycle would keep what it holds
    try:
        cache = DynamicCache(config=model.config)
        model(tokens(1, LONG), past_key_values=cache)
        assert [reference() for reference in whole] == [None] * LAYERS
    finally:
        gc.enable()
        for hook in hooks:
            hook.remove()
    assert held_tokens(cache) == [22] * LAYERS


def test_a_cache_is_freed_with_its_last_reference():
    model, _ = extended("window:20+sinks:3")
    gc.disable()  # a cycle would keep what it holds
    try:
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(tokens(1, 30), past_key_values=cache)
        held = [weakref.ref(layer.keys) for layer in cache.layers]
        del cache
        assert [reference() for reference in held] == [None] * LAYERS
    finally:
        gc.enable()


def test_sinks_keep_their_own_rotation():
    model, _ = extended("window:6+sinks:2")
    cache, ids = DynamicCache(config=model.config), tokens(1, 60)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        whole = DynamicCache()
        model(ids, past_key_values=whole)
    for held, all_keys in zip(cache.layers, whole.layers, strict=True):
        assert torch.equal(held.keys[:, :, :2], all_keys.keys[:, :, :2])
        assert torch.equal(held.keys[:, :, 2:], all_keys.keys[:, :, -5:])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pattern=st.one_of(
        st.builds(Pattern, st.just("window"), st.integers(1, 9), st.just(0), st.integers(0, 4)),
        st.integers(1, 9).flatmap(
            lambda size: st.builds(Pattern, st.just("group"), st.just(size), st.integers(0, size - 1))
        ),
    ),
    padding=st.none() | st.lists(st.integers(0, 45), min_size=2, max_size=2),
    cuts=st.sets(st.integers(1, 49), max_size=30),
    slack=st.sampled_from([1, 3, 16]),
)
@torch.no_grad()
def test_any_band_padding_and_chunks_agree_with_dense(pattern, padding, cuts, slack):
    model = _one_layer()
    extend(model, None, Plan(attention=[str(pattern)]))
    ids, mask, positions, start = (t[..., :50] for t in padded(padding or [0, 0]))
    dense = under_eager(model, [pattern])
    expected = masked(dense, ids, position_ids=positions, kv_start=start)
    real = mask.bool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longattn.hf.caches.SMALLEST_SLACK", slack)
        mask = None if padding is None else mask
        got = stepwise(model, ids, mask, positions, DynamicCache(config=model.config), [0, *sorted(cuts), 50])
    assert_agree(got[real], expected[real])


def _one_layer(length=64):
    return build("llama", num_hidden_layers=1, max_position_embeddings=length)


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_of_a_model_without_patterns_stay_as_they_are(family):
    stock = build(family)
    kinds = [type(layer) for layer in DynamicCache(config=stock.config).layers]
    static = [type(layer) for layer in StaticCache(config=stock.config, max_cache_len=9).layers]
    assert not any(issubclass(kind, BandLayer) for kind in kinds)
    model = build(family)
    extend(model, None, Plan(rope={"rope_type": "linear", "factor": 2.0}))
    assert [type(layer) for layer in DynamicCache(config=model.config).layers] == kinds
    extend(model, None, Plan(attention="window:6"))
    assert all(isinstance(layer, BandLayer) for layer in DynamicCache(config=model.config).layers)
    model.set_attn_implementation("eager")  # which knows nothing of the patterns
    assert [type(layer) for layer in DynamicCache(config=model.config).layers] == kinds
    assert [type(layer) for layer in StaticCache(config=model.config, max_cache_len=9).layers] == static


def test_static_windows_hold_their_window_only():
    model, _ = extended("window:6, window:40, window:6+sinks:2, group:7")
    cache = StaticCache(config=model.config, max_cache_len=60)
    with torch.no_grad():
        model(tokens(1, 50), past_key_values=cache)
    assert held_tokens(cache) == [6, 40, 60, 60]


@torch.no_grad()
def test_compiled_decoding_agrees(subtests):
    for plan in PLANS[1::2]:
        model = _one_layer(128)
        extend(model, None, Plan(attention=plan))
        dense = under_eager(model, parse_patterns(plan, 1))
        ids, mask, positions, start = padded([0, 30])
        expected = masked(dense, ids, position_ids=positions, kv_start=start)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        cache = DynamicCache(config=model.config)
        got = stepwise(model, ids, mask, positions, cache, [0, 80])
        got = torch.cat([got, stepwise(compiled, ids, mask, positions, cache, list(range(80, 97)))], 1)
        with subtests.test(plan=plan):
            assert_agree(got[mask[:, :96].bool()], expected[:, :96][mask[:, :96].bool()])


@torch.no_grad()
def test_models_that_keep_states_instead_of_keys_run_as_before_and_are_refused_by_name():
    model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    assert model(tokens(1, 4) % 16).logits.shape == (1, 4, 16)
    model.set_attn_implementation("longattn")
    with pytest.raises(ValueError, match="^longattn: model_type 'mamba' is not served"):
        model(tokens(1, 4) % 16)
