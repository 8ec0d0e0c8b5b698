"""What caches hold and what they show: decoding far past the window, in every order that transformers decodes in."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch
from hf_models import FAMILIES, LAYERS, assert_agree, build, masked, tokens, under_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

from longattn.hf.caches import BandLayer
from longattn.pattern import Pattern, parse_patterns
from longattn.plan import Plan
from longattn.surgery import extend

LONG = 150
MIXED = "window:1+sinks:1, group:5+shift, full, window:40"
PLANS = ("window:6", "window:20+sinks:3", "group:7", "group:8+shift:3", MIXED)


@functools.cache
def extended(plan: str, family: str = "llama"):
    model = build(family)
    extend(model, None, Plan(attention=plan, rope={"rope_type": "linear", "factor": 4.0}))
    return model, under_eager(model, parse_patterns(plan, LAYERS))


def padded(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of LONG tokens with padding in front: ids, mask, position ids, and padding a row."""
    ids, start = tokens(len(lengths), LONG), torch.tensor(lengths, dtype=torch.int32)
    mask = (torch.arange(LONG) >= start[:, None]).long()
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), start


def stepwise(model, ids, mask, positions, cache, edges):
    """Logits of all tokens, a chunk at a time."""
    logits = []
    for start, end in zip(edges, edges[1:], strict=False):
        part = slice(start, end)
        more = {} if mask is None else dict(attention_mask=mask[:, :end], position_ids=positions[:, part])
        logits.append(model(ids[:, part], past_key_values=cache, use_cache=True, **more).logits)
    return torch.cat(logits, 1)


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


def held_tokens(cache) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


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


GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


@functools.cache
def left_padded_prompts():
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    return ids, mask


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_far_past_the_window_is_as_with_a_cache_that_keeps_all(plan, options):
    model, _ = extended(plan)
    ids, mask = left_padded_prompts()
    got = model.generate(ids, attention_mask=mask, max_new_tokens=50, **GREEDY, **options)
    whole = model.generate(
        ids, attention_mask=mask, max_new_tokens=50, past_key_values=DynamicCache(), **GREEDY, **options
    )
    static = model.generate(
        ids, attention_mask=mask, max_new_tokens=50, cache_implementation="static", **GREEDY, **options
    )
    assert torch.equal(got, whole) and torch.equal(got, static)
    if not options:
        chunks = model.generate(ids, attention_mask=mask, max_new_tokens=50, prefill_chunk_size=16, **GREEDY)
        assert torch.equal(got, chunks)
    assert got[:, 40:].unique().numel() > 4  # texts, not one token again and again


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("padding", [0, 9])
def test_assisted_decoding_gives_the_same_text(plan, padding):
    model, _ = extended(plan)
    helper = build("llama", num_hidden_layers=1)
    extend(helper, None, Plan(attention="window:5+sinks:1"))
    near = copy.deepcopy(model)  # agrees often, but not always, so that tokens are taken back
    with torch.no_grad():
        near.model.layers[3].mlp.down_proj.weight.mul_(0.8)
    ids, mask = tokens(1, 30), torch.ones(1, 30, dtype=torch.long)
    mask[:, :padding] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=40, **GREEDY)
    for assistant in (helper, near):
        got = model.generate(ids, attention_mask=mask, max_new_tokens=40, assistant_model=assistant, **GREEDY)
        assert torch.equal(got, expected)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=40, prompt_lookup_num_tokens=4, **GREEDY)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_crop_takes_back_tokens_that_were_recorded():
    model, dense = extended("window:6+sinks:2")
    ids = tokens(1, 80)
    expected = masked(dense, ids)
    cache = DynamicCache(config=model.config)
    model(ids[:, :60], past_key_values=cache)
    cache.activate_past_recording()
    for at in range(60, 70):
        wrong = ids[:, at : at + 8].flip(1)
        model(wrong[:, :3], past_key_values=cache)
        model(wrong[:, 3:], past_key_values=cache)
        cache.crop(-8)
        assert held_tokens(cache) == [held_tokens(cache)[0]] * LAYERS and held_tokens(cache)[0] <= 7 + 16
        logits = model(ids[:, at : at + 1], past_key_values=cache).logits
        assert_agree(logits, expected[:, at : at + 1])
        cache.crop(0)


@torch.no_grad()
def test_crop_that_would_need_dropped_keys_is_refused():
    model, _ = extended("window:6+sinks:2")
    cache = DynamicCache(config=model.config)
    model(tokens(1, 60), past_key_values=cache)
    with pytest.raises(RuntimeError, match="crop: 4 tokens can't be taken back"):
        cache.crop(-4)
    assert held_tokens(cache) == [7] * LAYERS and cache.get_seq_length() == 60
    with pytest.raises(ValueError, match="must not be positive, got 3"):
        cache.crop(3)


@torch.no_grad()
def test_reset_starts_again():
    model, _ = extended(MIXED)
    cache, ids = DynamicCache(config=model.config), tokens(1, 60)
    first = model(ids, past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, first)


@torch.no_grad()
def test_rows_can_be_reordered_repeated_and_selected():
    model, _ = extended("window:6+sinks:2")
    ids, mask, positions, _ = padded([0, 30])
    cache = DynamicCache(config=model.config)
    stepwise(model, ids, mask, positions, cache, [0, 60, 61])
    more = dict(attention_mask=mask[:, :62], position_ids=positions[:, 61:62])
    expected = model(ids[:, 61:62], past_key_values=copy.deepcopy(cache), **more).logits
    rows = torch.tensor([1, 0, 1])
    cache.batch_repeat_interleave(2)  # 0 0 1 1
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))  # 1 1 0 0
    cache.batch_select_indices(torch.tensor([0, 3, 1]))
    more = {name: tensor[rows] for name, tensor in more.items()}
    assert torch.equal(model(ids[rows, 61:62], past_key_values=cache, **more).logits, expected[rows])


@torch.no_grad()
def test_crop_after_a_reorder_waits_for_the_rows_new_padding():
    model, _ = extended("window:6+sinks:2")
    ids, mask, positions, _ = padded([0, 50])
    swapped = torch.tensor([1, 0])
    logits = []
    for crop in (False, True):
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        stepwise(model, ids, mask, positions, cache, [0, 52])
        cache.reorder_cache(swapped)
        if crop:
            cache.crop(0)
        more = dict(attention_mask=mask[swapped, :90], position_ids=positions[swapped, 52:90])
        logits.append(model(ids[swapped, 52:90], past_key_values=cache, **more).logits)
    assert_agree(logits[1], logits[0])


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
def test_training_pattern_is_refused_on_a_cache_that_has_dropped_keys():
    model = build("llama")
    extend(model, None, Plan(attention="window:6", train_attention="group:16+shift"))
    cache = DynamicCache(config=model.config)
    model(tokens(1, 60), past_key_values=cache)
    with pytest.raises(ValueError, match="call model.eval\\(\\) before decoding"):
        model.train()(tokens(1, 1), past_key_values=cache)


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
