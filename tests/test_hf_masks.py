"""What the mask function makes of padding and caches, and what it and the attention function refuse."""

from __future__ import annotations

import pytest
import torch
from hf_models import SIZES, build, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

import longattn
from longattn.hf.attention import longattn_attention
from longattn.hf.masks import longattn_mask, packed_cu_seqlens, row_bounds
from longattn.plan import Plan
from longattn.surgery import extend


@pytest.fixture(scope="module")
def model():
    model = build("llama")
    extend(model, None, Plan(attention="window:6"))
    return model


def test_importing_registers_with_transformers():
    assert AttentionInterface()["longattn"] is longattn_attention
    assert AttentionMaskInterface()["longattn"] is longattn_mask


def test_bounds_of_padded_rows():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    bounds = longattn_mask(4, 4, 4, attention_mask=mask)
    start, end = row_bounds(bounds, 4, 4)
    assert start.tolist() == [0, 2, 0, 4] and start.dtype == torch.int32 and end is None
    # a cache that has dropped 3 keys, and a second pass over bounds that generate formed
    start, _ = row_bounds(longattn_mask(4, 1, 4, q_offset=3, attention_mask=mask), 4, 1)
    assert start.tolist() == [0, 0, 0, 1]
    assert longattn_mask(4, 4, 4, attention_mask=bounds) is bounds
    assert longattn_mask(4, 4, 4) is None
    assert longattn_mask(4, 4, 4, attention_mask=torch.ones_like(mask)) is None


def test_bounds_of_static_caches():
    bounds = longattn_mask(2, 3, 16, q_offset=torch.tensor(5))
    start, end = row_bounds(bounds, 2, 16)
    assert start.tolist() == [0, 0] and end.tolist() == [8, 8] and end.dtype == torch.int32
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    bounds = longattn_mask(2, 3, 16, attention_mask=mask)
    for slots, first in ((16, [1, 0]), (3, [1, 0]), (2, [0, 0])):  # a ring of two slots has lost the first token
        start, end = row_bounds(bounds, 2, slots)
        assert start.tolist() == first and end.tolist() == [min(slots, 3)] * 2


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3))
def test_packed_borders_are_the_documents_on_every_device(lengths):
    total = max(sum(row) for row in lengths)
    lengths = [[*row, *[1] * (total - sum(row))] for row in lengths]
    positions = torch.tensor([[i for length in row for i in range(length)] for row in lengths])
    borders = torch.tensor([0, *[length for row in lengths for length in row]]).cumsum(0)
    found = packed_cu_seqlens(positions, len(lengths))
    if all(len(row) == 1 for row in lengths):
        assert found is None
    else:
        assert found.tolist() == borders.tolist() and found.dtype == torch.int32
    # under a compiler, as on devices, no value is read: empty documents fill the end up
    fixed = torch.compile(packed_cu_seqlens, backend="eager", fullgraph=True, dynamic=True)(positions, len(lengths))
    assert fixed.shape == (positions.numel() + 1,)
    assert fixed.unique().tolist() == borders.tolist() and fixed.dtype == torch.int32


def test_mask_with_holes_is_refused(model):
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask must have its ones in one piece a row .* in row 1"):
        model(tokens(2, 5), attention_mask=mask)


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (2, 5, 5)])
def test_mask_of_more_dimensions_is_refused(model, shape):
    with pytest.raises(ValueError, match=r"attention_mask must be .*2-D .*, got .*\(2, .*5, 5\)"):
        model(tokens(2, 5), attention_mask=torch.ones(shape, dtype=torch.bool))


def test_mask_that_misses_the_cached_tokens_is_refused(model):
    cache = model(tokens(1, 6), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="must cover the 6 tokens in the cache and the 2 new ones, got 2"):
        model(tokens(1, 2), attention_mask=torch.ones(1, 2), past_key_values=cache)


def test_joined_masks_are_refused():
    with pytest.raises(ValueError, match="or_mask, and_mask"):
        longattn_mask(1, 4, 4, use_vmap=True)


def test_packed_rows_are_refused_where_the_cache_has_lost_documents(model):
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        model(tokens(1, 4), past_key_values=cache)
        with pytest.raises(ValueError, match="position_ids start again inside a row"):
            model(tokens(1, 5), position_ids=positions, past_key_values=cache)
    with pytest.raises(ValueError, match="without a static cache"):
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(tokens(1, 5), position_ids=positions, past_key_values=cache)


def test_cu_seq_lens_of_several_rows_are_refused(model):
    borders = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q needs one row .* B = 2, 5 queries, 5 keys, no mask"):
        model(tokens(2, 5), cu_seq_lens_q=borders, cu_seq_lens_k=borders, use_cache=False)
    with pytest.raises(ValueError, match=r"cu_seq_lens_k must be cu_seq_lens_q, got shapes \(2,\) and \(3,\)"):
        model(tokens(1, 5), cu_seq_lens_q=borders, cu_seq_lens_k=borders[:2], use_cache=False)


def test_attention_without_a_plan_of_a_family_that_is_not_served_is_refused():
    config = LlamaConfig(**SIZES, attn_implementation="longattn")
    config.model_type = "another"
    with pytest.raises(ValueError, match="model_type 'another' is not served"):
        LlamaForCausalLM(config)(tokens(1, 4))


def test_two_way_attention_is_refused(model):
    query = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match="every pattern is causal"):
        longattn_attention(model.model.layers[0].self_attn, query, query, query, None, is_causal=False)


@torch.no_grad()
def test_no_value_is_read_on_a_device():
    model = build("qwen2")
    extend(model, None, Plan(attention="window:6, group:5+shift"))
    model, ids = model.to("meta"), tokens(2, 9).to("meta")
    mask, positions = torch.ones_like(ids), torch.zeros_like(ids)
    assert model(ids, use_cache=True).logits.shape == (2, 9, 64)
    assert model(ids, position_ids=positions, use_cache=True).logits.is_meta
    cache = model(ids, attention_mask=mask, position_ids=positions).past_key_values
    longer = torch.ones(2, 12, dtype=torch.long, device="meta")
    assert model(ids[:, :3], attention_mask=longer, past_key_values=cache).logits.shape == (2, 3, 64)


def test_masks_are_not_read_on_the_meta_device():
    mask = torch.ones(2, 4, dtype=torch.bool, device="meta")
    with longattn.debug():
        assert longattn_mask(2, 4, 4, attention_mask=mask).shape == (2, 1, 2)
        assert packed_cu_seqlens(torch.zeros(2, 4, dtype=torch.long, device="meta"), 2).shape == (9,)
