"""csrc/band.h, compiled with g++: masks, tile ranges and interior tiles against the reference's visible pairs."""

import ctypes
from pathlib import Path

import pytest
import torch
from emulator.build import load
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import visible_mask

INT64, INT32, POINTER = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p


class Rows(ctypes.Structure):
    _fields_ = [
        ("num_queries", INT32), ("num_keys", INT32), ("query_start", INT64), ("key_start", INT64), ("sinks", INT64),
        ("cu_seqlens", POINTER), ("num_documents", INT32), ("kv_start", POINTER), ("kv_end", POINTER),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return load(tmp_path_factory.mktemp("band"), Path(__file__).parent / "emulator" / "band_probe.cpp", "-O1")


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def make_rows(sq, sk, query_start=None, key_start=0, sinks=0, cu_seqlens=None, kv_start=None, kv_end=None):
    documents = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    start = sk - sq if query_start is None else query_start
    return Rows(sq, sk, start, key_start, sinks, pointer(cu_seqlens), documents, pointer(kv_start), pointer(kv_end))


def probe(library, ends, rows, batch, tile_queries, tile_keys, ordered=True):
    """(malformed ranges, number of tiles, the six tables of band_probe) of one batch row."""
    shape = (rows.num_queries, rows.num_keys)
    dtypes = (torch.uint8, torch.uint8, torch.int32, torch.uint8, torch.int32, torch.uint8)
    tables = [torch.zeros(shape, dtype=dtype) for dtype in dtypes]
    count = INT32()
    bad = library.band_probe(
        (INT64 * 3)(*ends), ctypes.byref(rows), batch, ordered, tile_queries, tile_keys, *map(pointer, tables),
        ctypes.byref(count),
    )  # fmt: skip
    return bad, count.value, tables


@st.composite
def bands(draw):
    """(ends for the probe, the reference's arguments)."""
    if draw(st.booleans()):
        left, right = draw(st.integers(-1, 40)), draw(st.integers(-1, 40))
        return (0, left, right), {"window": (left, right)}
    size = draw(st.one_of(st.integers(1, 50), st.just(1 << 62)))
    shift, causal = draw(st.integers(0, min(size, 60) - 1)), draw(st.booleans())
    return (size, shift, causal), {"group": size, "shifts": [shift], "causal": causal}


@st.composite
def placements(draw):
    """Keyword arguments that the reference and make_rows share: (sq, sk, batch, arguments)."""
    sq, batch = draw(st.integers(1, 70)), 1
    kind = draw(st.sampled_from(["plain", "shard", "documents", "shard of documents", "rows"]))
    sk = sq if kind == "documents" else sq + draw(st.integers(0, 60))
    args = {}
    if kind.startswith("shard"):
        args["query_start"], args["key_start"] = draw(st.integers(0, 90)), draw(st.integers(0, 90))
        sk = draw(st.integers(1, 80))
    if kind.endswith("documents"):
        total = sq if kind == "documents" else 180
        borders = draw(st.lists(st.integers(0, total), max_size=6))
        args["cu_seqlens"] = torch.tensor([0, *sorted(borders), total], dtype=torch.int32)
    if kind == "rows":
        batch = 2
        if draw(st.booleans()):
            args["kv_start"] = torch.tensor([draw(st.integers(0, sk)) for _ in range(batch)], dtype=torch.int32)
        if draw(st.booleans()):
            args["kv_end"] = torch.tensor([draw(st.integers(0, sk)) for _ in range(batch)], dtype=torch.int32)
    args["sinks"] = draw(st.sampled_from([0, 0, 1, 4, 30]))
    return sq, sk, batch, args


@settings(max_examples=400, deadline=None)
@given(bands(), placements(), st.sampled_from([1, 7, 16, 64]), st.sampled_from([1, 8, 16, 64]))
@example(((0, 3, 0), {"window": (3, 0)}), (70, 70, 1, {"sinks": 4}), 16, 8)
@example(((16, 8, 1), {"group": 16, "shifts": [8], "causal": True}), (64, 64, 1, {"sinks": 4}), 16, 16)
def test_every_visible_pair_is_visited_once_and_interior_tiles_hide_none(library, band, placement, rows, cols):
    ends, band_args = band
    sq, sk, batch, args = placement
    mask = visible_mask(batch, 1, sq, sk, **band_args, **args)[:, 0]
    for b in range(batch):
        bad, _, tables = probe(library, ends, make_rows(sq, sk, **args), b, rows, cols)
        by_query, by_key, visits, interior, meetings, common = tables
        assert bad == 0
        assert torch.equal(by_query.bool(), mask[b])
        assert torch.equal(by_key.bool(), mask[b])
        assert visits.max() <= 1 and bool((visits[mask[b]] == 1).all())
        assert meetings.max() <= 1 and bool((meetings[mask[b]] == 1).all())
        assert bool(mask[b][interior.bool()].all())
        assert bool(mask[b][common.bool()].all())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 19), min_size=2, max_size=4), st.booleans(), placements(), st.sampled_from([8, 16]))
def test_a_tile_that_heads_of_different_shift_share_takes_the_union(library, shifts, causal, placement, cols):
    sq, sk, _, args = placement
    mask = visible_mask(1, len(shifts), sq, sk, group=20, shifts=shifts, causal=causal, **pick_first(args))[0]
    rows = make_rows(sq, sk, **pick_first(args))
    for start in range(0, sq, 16):
        stop = min(start + 16, sq)
        visits, interior = torch.zeros(sk, dtype=torch.int32), torch.zeros(sk, dtype=torch.uint8)
        bad = library.shared_tile_probe(
            INT64(20), causal, (INT64 * len(shifts))(*shifts), len(shifts), ctypes.byref(rows), start, stop, cols,
            pointer(visits), pointer(interior),
        )  # fmt: skip
        assert bad == 0 and visits.max() <= 1
        assert bool(visits[mask[:, start:stop].any(0).any(0)].all())
        assert bool(mask[:, start:stop, interior.bool()].all())


def pick_first(args):
    """The arguments of a batch of one row."""
    return {name: x[:1] if name in ("kv_start", "kv_end") else x for name, x in args.items()}


def test_tiles_are_as_few_as_a_window_allows(library):
    """Each tile of queries visits ceil((its hull of keys) / tile) tiles: the closed form that byte counts rest on."""
    sq, left = 500, 100
    for rows, cols in ((64, 64), (128, 32), (16, 16)):
        _, count, tables = probe(library, (0, left, 0), make_rows(sq, sq), 0, rows, cols)
        hulls = [(min(q + rows, sq) - max(0, q - left)) for q in range(0, sq, rows)]
        assert count == sum(-(-hull // cols) for hull in hulls)
        edge = (tables[2].bool() & ~tables[3].bool()).sum(1)[left + rows : sq - rows]
        assert edge.max() <= 2 * rows + 2 * cols, "more edge tiles than the two ends need"


def test_sinks_before_the_band_cost_their_own_tiles_alone(library):
    plain = probe(library, (0, 63, 0), make_rows(1024, 1024), 0, 64, 64)[1]
    sinks = probe(library, (0, 63, 0), make_rows(1024, 1024, sinks=4), 0, 64, 64)[1]
    assert sinks - plain == 1024 // 64 - 2  # the first two tiles of queries hold the sinks in their band


@settings(max_examples=100, deadline=None)
@given(bands(), st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=9), st.sampled_from(["docs", "rows"]))
def test_no_value_of_an_index_tensor_leads_outside(library, band, values, kind):
    values = torch.tensor(values, dtype=torch.int32)
    args = {"cu_seqlens": values} if kind == "docs" else {"kv_start": values[:1], "kv_end": values[1:2]}
    bad, _, tables = probe(library, band[0], make_rows(40, 50, sinks=3, **args), 0, 16, 8, ordered=kind == "rows")
    assert bad == 0
    if kind == "rows":
        assert tables[2].max() <= 1
