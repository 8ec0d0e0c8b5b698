"""Which keys a shard lacks: compared, key by key, with the mask of the whole sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import visible_mask

from longattn.distributed.plan import check_offsets, head_sets, needs_of, pieces
from longattn.ops.band import GroupBand, WindowBand

TOKENS = 24


@st.composite
def cuts(draw):
    """Borders of up to four shards or documents, some of them empty."""
    return [0, *sorted(draw(st.lists(st.integers(0, TOKENS), max_size=3))), TOKENS]


@st.composite
def bands(draw):
    """A band, and what the reference calls it."""
    if draw(st.booleans()):
        left, right = draw(st.integers(-1, TOKENS)), draw(st.integers(-1, 5))
        return WindowBand(left, right), dict(window=(left, right))
    size = draw(st.integers(1, TOKENS + 4))
    shift, causal = draw(st.integers(0, size - 1)), draw(st.booleans())
    return GroupBand(size, shift, causal), dict(group=size, shifts=[shift], causal=causal)


@settings(max_examples=150, deadline=None)
@given(bands(), cuts(), st.none() | cuts(), st.integers(0, 6))
def test_needs_are_the_keys_of_other_ranks_that_are_seen(band, offsets, documents, sinks):
    band, named = band
    borders = None if documents is None else torch.tensor(documents)
    mask = visible_mask(1, 1, TOKENS, TOKENS, sinks=sinks, cu_seqlens=borders, **named)[0, 0]
    for rank in range(len(offsets) - 1):
        own = slice(offsets[rank], offsets[rank + 1])
        missing = mask[own].clone()
        missing[:, own] = False
        needs = needs_of([band], offsets, rank, sinks, documents)
        keys = [key for need in needs for key in range(*need.keys)]
        assert keys == sorted(set(keys)) and not set(keys) & set(range(TOKENS)[own])
        assert set(keys) >= set(missing.any(0).nonzero()[:, 0].tolist())
        if not sinks:  # no key travels that nobody sees
            assert set(keys) == set(missing.any(0).nonzero()[:, 0].tolist())
        for need in needs:
            seen = missing[:, slice(*need.keys)]
            rows = seen.any(1).nonzero()[:, 0] + own.start
            assert all(need.queries[0] <= row < need.queries[1] for row in rows.tolist())


@given(cuts(), bands())
@settings(max_examples=50, deadline=None)
def test_pieces_of_all_shards_are_the_needs(offsets, band):
    for rank in range(len(offsets) - 1):
        needs = needs_of([band[0]], offsets, rank)
        found = []
        for other in range(len(offsets) - 1):
            shard = (offsets[other], offsets[other + 1])
            found += [k for a, b in pieces(needs, shard) for k in range(a + shard[0], b + shard[0])]
        assert found == [key for need in needs for key in range(*need.keys)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "expected"),
    [(4, 2, [((0, 2), (0, 1)), ((2, 4), (1, 2))]), (6, 3, [((0, 6), (0, 3))]), (4, 1, [((0, 4), (0, 1))])],
)
def test_heads_travel_apart_unless_a_kv_head_serves_two_bands(heads, kv_heads, expected):
    bands = {0: GroupBand(8, 0, True), 4: GroupBand(8, 4, True)}
    shifts = [0] * (heads // 2) + [4] * (heads - heads // 2)
    assert [(found.query, found.kv) for found in head_sets(heads, kv_heads, shifts, bands)] == expected


@pytest.mark.parametrize("offsets", [[0, 4], [1, 4, 8], [0, 6, 4], [0, 3, 8]])
def test_offsets_that_do_not_fit_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets"):
        check_offsets("op", offsets, 2, 0, 4)
