"""Caches that drop keys, in what generate does: beams, assistants, tokens taken back, rows moved, a plan changed."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from cache_helpers import MIXED, PLANS, extended, held_tokens, padded, stepwise
from hf_models import LAYERS, assert_agree, build, masked, tokens
from transformers import DynamicCache

from longattn.plan import Plan
from longattn.surgery import extend

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


@torch.no_grad()
def test_training_pattern_is_refused_on_a_cache_that_has_dropped_keys():
    model = build("llama")
    extend(model, None, Plan(attention="window:6", train_attention="group:16+shift"))
    cache = DynamicCache(config=model.config)
    model(tokens(1, 60), past_key_values=cache)
    with pytest.raises(ValueError, match="call model.eval\\(\\) before decoding"):
        model.train()(tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_cache_of_an_earlier_plan_is_refused_once_it_has_dropped_keys():
    model = build("llama")
    extend(model, None, Plan(attention="window:6"))
    ids, cache = tokens(1, 60), DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    model.generate(ids, max_new_tokens=3, cache_implementation="static", **GREEDY)
    extend(model, None, Plan(attention="window:20"))
    with pytest.raises(ValueError, match="attends by window:20, .* dropped what window:6 does not see; .* a new cache"):
        model(tokens(1, 1), past_key_values=cache)
    static = model.generate(ids, max_new_tokens=9, cache_implementation="static", **GREEDY)  # which generate keeps
    assert torch.equal(static, model.generate(ids, max_new_tokens=9, use_cache=False, **GREEDY))
