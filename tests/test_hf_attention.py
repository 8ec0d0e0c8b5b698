"""Extended models against the same models under eager attention with dense masks, however tokens are given to them."""

from __future__ import annotations

import functools

import pytest
import torch
from hf_models import FAMILIES, LAYERS, assert_agree, build, masked, tokens, under_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from longattn.pattern import Pattern, parse_patterns
from longattn.plan import Plan
from longattn.surgery import extend

LENGTH = 22
CHUNKS = ((0, 5), (5, 6), (6, 16), (16, LENGTH))
# narrower than the families' own windows of 8, wider, mixed, and with all that is not a window
PLANS = (
    "window:4",
    "window:14",
    "full, window:8",
    "window:12, window:5",
    "window:1, window:12+sinks:3",
    "group:6+shift",
    "2 x window:4, full, group:5+shift:2+sinks:1",
)
CASES = [(family, plan) for family in FAMILIES for plan in PLANS]


@functools.cache
def extended(family: str, attention: str):
    """An extended model and its dense reference; tests don't change them."""
    model = build(family)
    extend(model, None, Plan(attention=attention, rope={"rope_type": "yarn", "factor": 2.0}))
    return model, under_eager(model, parse_patterns(attention, LAYERS))


def in_chunks(model, ids, cache, chunks=CHUNKS, mask=None, positions=None):
    """Logits of tokens that are given a chunk at a time."""
    logits = []
    for start, end in chunks:
        more = {} if mask is None else {"attention_mask": mask[:, :end]}
        more |= {} if positions is None else {"position_ids": positions[:, start:end]}
        logits.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **more).logits)
    return torch.cat(logits, 1)


def caches(model):
    return DynamicCache(config=model.config), DynamicCache(), StaticCache(config=model.config, max_cache_len=LENGTH + 3)


@pytest.mark.parametrize(("family", "plan"), CASES)
@torch.no_grad()
def test_prefill_and_decode_agree_with_dense(family, plan):
    model, dense = extended(family, plan)
    ids = tokens(2, LENGTH)
    expected = masked(dense, ids)
    assert_agree(model(ids).logits, expected, "prefill")
    steps = [(i, i + 1) for i in range(LENGTH)]
    assert_agree(in_chunks(model, ids, DynamicCache(config=model.config), steps), expected, "step by step")
    for cache in caches(model):
        assert_agree(in_chunks(model, ids, cache), expected, type(cache).__name__)


@pytest.mark.parametrize(("family", "plan"), CASES)
@torch.no_grad()
def test_padded_batches_agree_with_dense(family, plan):
    model, dense = extended(family, plan)
    ids = tokens(3, LENGTH)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :7] = 0
    mask[2, 17:] = 0
    real, start = mask.bool(), torch.tensor([0, 7, 0], dtype=torch.int32)
    assert_agree(model(ids, attention_mask=mask).logits[real], masked(dense, ids, kv_start=start)[real], "arange")
    shifted = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = masked(dense, ids, position_ids=shifted, kv_start=start)
    assert_agree(model(ids, attention_mask=mask, position_ids=shifted).logits[real], expected[real], "shifted")
    left, real = mask[:2], real[:2]
    for cache in caches(model):
        got = in_chunks(model, ids[:2], cache, mask=left, positions=shifted[:2])
        assert_agree(got[real], expected[:2][real], type(cache).__name__)


@pytest.mark.parametrize(("family", "plan"), CASES)
@torch.no_grad()
def test_packed_rows_agree_with_dense(family, plan):
    model, dense = extended(family, plan)
    ids = tokens(2, LENGTH)
    positions = torch.tensor([[*range(5), *range(11), *range(6)], [0, 0, *range(20)]])
    borders = torch.tensor([0, 5, 16, 22, 23, 24, 44], dtype=torch.int32)
    expected = masked(dense, ids, position_ids=positions, cu_seqlens=borders)
    for use_cache in (False, True):
        assert_agree(model(ids, position_ids=positions, use_cache=use_cache).logits, expected, "two rows")
        got = model(ids[:1], position_ids=positions[:1], use_cache=use_cache).logits
        assert_agree(got, expected[:1], "one row")
    flash = dict(cu_seq_lens_q=borders[:4], cu_seq_lens_k=borders[:4], max_length_q=11, max_length_k=11)
    got = model(ids[:1], position_ids=positions[:1], use_cache=False, **flash).logits
    assert_agree(got, expected[:1], "cu_seq_lens")


@pytest.mark.parametrize(("family", "plan"), [CASES[0], CASES[3], CASES[7], CASES[9], CASES[12], CASES[14], CASES[17]])
@torch.no_grad()
def test_generate_agrees_with_dense(family, plan):
    model, dense = extended(family, plan)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    rows = []
    for row, start in ((0, 0), (1, 4)):
        text = ids[row : row + 1, start:]
        for _ in range(10):
            text = torch.cat([text, masked(dense, text)[:, -1:].argmax(-1)], 1)
        rows.append(text[0, -10:])
    greedy = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    for cache in (None, "static"):
        got = model.generate(ids, attention_mask=mask, cache_implementation=cache, **greedy)
        assert torch.equal(got[:, -10:], torch.stack(rows)), f"cache {cache}"
    beams = model.generate(ids[:1], num_beams=2, **greedy)
    assert beams.shape == (1, 19)


PATTERNS = st.one_of(
    st.just(Pattern("full")),
    st.builds(Pattern, st.just("window"), st.integers(1, 9), st.just(0), st.integers(0, 3)),
    st.integers(1, 8).flatmap(
        lambda size: st.builds(Pattern, st.just("group"), st.just(size), st.integers(0, size - 1), st.integers(0, 3))
    ),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(FAMILIES),
    patterns=st.lists(PATTERNS, min_size=LAYERS, max_size=LAYERS),
    padding=st.lists(st.integers(0, 10), min_size=2, max_size=2),
    cuts=st.sets(st.integers(1, 11), max_size=3),
    static=st.booleans(),
)
@torch.no_grad()
def test_any_patterns_padding_and_chunks_agree_with_dense(family, patterns, padding, cuts, static):
    model = build(family)
    plan = Plan(attention=[str(p) for p in patterns], rope={"rope_type": "linear", "factor": 2.0})
    extend(model, None, plan)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    for row, pad in enumerate(padding):
        mask[row, :pad] = 0
    real = mask.bool()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    start = torch.tensor(padding, dtype=torch.int32)
    expected = masked(under_eager(model, patterns), ids, position_ids=positions, kv_start=start)
    cache = StaticCache(config=model.config, max_cache_len=13) if static else DynamicCache(config=model.config)
    edges = [0, *sorted(cuts), 12]
    got = in_chunks(model, ids, cache, list(zip(edges, edges[1:], strict=False)), mask, positions)
    assert_agree(got[real], expected[real])


def test_layers_that_the_record_lacks_are_refused():
    model = build("llama")
    extend(model, None, Plan(attention="window:6"))
    model.config.longattn["attention"] = model.config.longattn["attention"][:2]  # as where layers were added since
    with pytest.raises(ValueError, match="has patterns of 2 layers, and this is layer 2; extend the model"):
        model(tokens(1, 8), use_cache=False)
    extend(model, None, Plan(attention="window:6"))
    model(tokens(1, 8))
