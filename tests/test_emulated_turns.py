"""csrc/window_attn_bwd_turns.h, compiled with g++: whose turn it is to add to a tile of queries' gradient."""

import ctypes
from pathlib import Path

import pytest
import torch
from emulator.build import load
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_emulated_band import INT64, bands, make_rows, placements

ANY_BORDER = st.integers(-(2**31), 2**31 - 1) | st.integers(-5, 80)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return load(tmp_path_factory.mktemp("turns"), Path(__file__).parent / "emulator" / "turns_probe.cpp", "-O1")


@settings(max_examples=600, deadline=None)
@given(bands(), placements(), st.sampled_from([4, 8, 16]), st.integers(0, 4), st.integers(1, 5))
@example(((0, 0, 0), {}), (20, 60, 1, {"query_start": 7, "key_start": 0}), 4, 3, 2)
def test_queries_have_one_turn_with_each_tile_of_keys_that_they_see(library, band, placement, size, bits, blocks):
    """One first and one last turn, in order, none left out and none waited for in vain; what has no turn is cleared."""
    sq, sk, batch, args = placement
    rows = make_rows(sq, sk, **args | {"sinks": 0, "kv_end": None})
    for row in range(batch):
        assert library.turns_probe((INT64 * 3)(*band[0]), ctypes.byref(rows), row, size, bits, blocks) == 0


@settings(max_examples=200, deadline=None)
@given(bands(), st.lists(ANY_BORDER, min_size=1, max_size=6), st.integers(1, 5))
def test_documents_in_no_order_are_no_deadlock(library, band, borders, blocks):
    """What they give is undefined, but a kernel that waits forever would take the device with it."""
    rows = make_rows(60, 60, cu_seqlens=torch.tensor(borders, dtype=torch.int32))
    for bits in (0, 2):
        wrong = library.turns_probe((INT64 * 3)(*band[0]), ctypes.byref(rows), 0, 8, bits, blocks)
        assert not wrong & (1 | 32)
