"""Both attention ops against the float64 reference over shapes, patterns and features drawn together."""

from __future__ import annotations

import pytest
import torch
from attention_calls import GROUPS, LENGTHS, WINDOWS, calls, check_group, check_window
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import check_against_dense, half_shifts, visible_mask

import longattn
from longattn.ops.band import GroupBand, WindowBand
from longattn.ops.tiles import additive_mask, make_runs
from longattn.pattern import Pattern

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def bands(draw):
    if draw(st.booleans()):
        return WindowBand(*draw(WINDOWS))
    size = draw(st.sampled_from([1, 2, 3, 4, 7, 16, 32, 50]))
    return GroupBand(size, draw(st.integers(0, size - 1)), draw(st.booleans()))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    band=bands(),
    num_queries=st.sampled_from(LENGTHS),
    num_keys=st.sampled_from(LENGTHS),
    query_start=st.integers(0, 80),
    key_start=st.sampled_from([0, 0, 4, 11]),
    sinks=st.sampled_from([0, 1, 3, 6, 20]),
    block=st.sampled_from([4, 8, 32]),
    most=st.sampled_from([3, 1000]),
)
def test_tiles_visit_each_visible_pair_once(band, num_queries, num_keys, query_start, key_start, sinks, block, most):
    position, key = query_start + torch.arange(num_queries)[:, None], key_start + torch.arange(num_keys)[None]
    seen = (key <= band.hi(position)) & ((key >= band.lo(position)) | (key < sinks))
    visits = torch.zeros(num_queries, num_keys, dtype=torch.int64)
    for run in make_runs(band, num_queries, num_keys, query_start, key_start, sinks, block):
        for tile in (part for t in range(run.count) for part in run.tiles(t, 1).narrowed(most)):
            if tile.kind == "triangle":
                visible = torch.ones(tile.rows, tile.cols).tril()
            else:
                mask = additive_mask(tile, torch.float32, torch.device("cpu"))
                visible = torch.ones(tile.rows, tile.cols) if mask is None else (mask == 0)
            assert visible.any(1).all(), "a tile must hold no row that sees nothing"
            visits[tile.query : tile.query + tile.rows, tile.key : tile.key + tile.cols] += visible.to(visits.dtype)
    assert torch.equal(visits, seen.to(visits.dtype))


@SETTINGS
@given(call=calls(), window=WINDOWS, use_lse=st.booleans())
def test_window_attention_matches_reference(call, window, use_lse):
    check_window(call, window, use_lse=use_lse)


@SETTINGS
@given(call=calls(), group=GROUPS, part=st.floats(0, 0.99), causal=st.booleans())
def test_group_attention_matches_reference(call, group, part, causal):
    check_group(call, group, int(part * group), causal)


@st.composite
def patterns(draw):
    kind = draw(st.sampled_from(["full", "window", "group"]))
    if kind == "full":
        return Pattern("full")
    size = draw(st.integers(1, 40))
    shift = draw(st.integers(0, size - 1)) if kind == "group" else 0
    return Pattern(kind, size, shift, draw(st.integers(0, 12)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(pattern=patterns(), tokens=st.integers(0, 70))
def test_pattern_counts_visible_pairs(pattern, tokens):
    if pattern.kind == "group":
        mask = visible_mask(
            1, 2, tokens, tokens, group=pattern.size, shifts=half_shifts(2, pattern.shift), sinks=pattern.sinks
        )
    else:
        window = (-1, 0) if pattern.kind == "full" else (pattern.size - 1, 0)
        mask = visible_mask(1, 2, tokens, tokens, window=window, sinks=pattern.sinks)
    assert pattern.visible(tokens) == mask.sum().item() / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, -1.0, -1e-30, 3.0])
def test_scales_of_any_sign_match_reference(scale, dtype):
    query, key, value = torch.randn(3, 1, 2, 70, 8).to(dtype)
    mask = visible_mask(1, 2, 70, 70, window=(20, 0))

    def attend(query, key, value, sink_logits):
        return longattn.window_attention(query, key, value, (20, 0), scale=scale, return_lse=True)

    check_against_dense(attend, query, key, value, mask, scale=scale)
