"""The CUDA kernels for few queries against many keys, in the emulator: results, splits, memory traffic, caches."""

import pytest
import torch
from emulator.attention import Call, shared_driver
from emulator.checks import check, check_nan, qkv

CAUSAL = Call(window=(-1, 0))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return shared_driver(tmp_path_factory)


@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 72, 96, 100, 128, 160, 192, 200, 256])
@pytest.mark.parametrize("queries,heads", [(1, 2), (4, 10)], ids=["one row tile", "many"])
def test_results_are_right_for_every_head_dim(emulated, head_dim, queries, heads):
    emulated.multiprocessors = 16
    call = Call(window=(170, 0), sinks=5)
    inputs = qkv(2, heads, 2, queries, 300, head_dim)
    check(emulated, *inputs, call, torch.randn(heads), seed=1)
    assert emulated.plan(*inputs, call)["splits"] > 1


def test_heads_of_one_key_head_may_be_shifted_differently(emulated):
    """Their tile takes the union of what they see, and masks."""
    emulated.multiprocessors = 8
    for shifts in ((0, 0, 60, 60), (0, 35, 119, 1)):
        call = Call(group=120, shifts=shifts, sinks=3)
        for queries in (1, 5, 40):
            check(emulated, *qkv(1, 4, 1, queries, 500, 64), call, seed=2)


def test_nan_comes_out_as_nan(emulated):
    for emulated.multiprocessors in (1, 40):  # whole, and in splits
        check_nan(emulated, 1, 300)
        check_nan(emulated, 3, 300)


def test_one_query_fills_the_device(emulated):
    """Blocks, from shapes alone, of one sequence: full waves of a device, and no split where there is no need."""
    emulated.multiprocessors = 132
    for keys, kv_heads, window in ((32768, 8, -1), (32768, 2, -1), (131072, 1, -1), (32768, 8, 1023), (1024, 8, -1)):
        blocks = kv_heads * emulated.plan(*qkv(1, 8, kv_heads, 1, keys, 128), Call(window=(window, 0)))["splits"]
        assert blocks / (-(-blocks // 132) * 132) > 0.95
    assert emulated.plan(*qkv(1, 8, 8, 1, 64, 128), CAUSAL)["splits"] == 1
    assert emulated.plan(*qkv(33, 8, 8, 1, 1024, 128), CAUSAL)["splits"] == 1  # two waves as it is


def test_scratch_does_not_grow_with_the_keys(emulated):
    emulated.multiprocessors = 132
    query, key, value = qkv(1, 32, 8, 1, 1, 128)
    for keys in (1 << 12, 1 << 18, 1 << 24):
        plan = emulated.plan(query, *(x.expand(1, 8, keys, 128) for x in (key, value)), CAUSAL)
        assert plan["scratch"] == 32 * plan["splits"] * (128 + 1) * 4
        assert 1 < plan["splits"] <= 128


@pytest.mark.parametrize("left,sinks", [(-1, 0), (299, 0), (299, 4)])
def test_keys_are_read_once_for_all_heads_and_queries(emulated, left, sinks):
    """Bytes equal the closed form: K and V of the hull, Q once a split, and the parts that are combined."""
    emulated.multiprocessors = 16
    batch, heads, kv_heads, queries, keys, head_dim = 1, 8, 2, 2, 1000, 64
    emulated.forward(*qkv(batch, heads, kv_heads, queries, keys, head_dim), Call(window=(left, 0), sinks=sinks))
    hull = keys if left < 0 else left + queries
    splits = emulated.counters["splits"]
    rows, row_bytes = batch * heads * queries, 2 * head_dim
    sink_bytes = 64 if sinks else 0  # a tile of its own
    read = 2 * kv_heads * (hull + sink_bytes) * row_bytes + rows * splits * row_bytes
    parts = rows * splits * head_dim * 4
    assert emulated.counters["bytes_read"] == read + parts
    assert emulated.counters["bytes_written"] == parts + rows * row_bytes
    tiles = kv_heads * (-(-hull // 64) + bool(sinks))
    assert emulated.counters["mma"] == tiles * 4 * 2 * (16 // 8) * (head_dim // 16)


def test_slots_of_a_cache_that_were_never_written_do_not_matter(emulated):
    """What lies from kv_end on may be anything, NaNs too, in decoding, prefill and backward."""
    for queries in (1, 70):
        query, key, value = qkv(2, 4, 2, queries, 300, 64)
        rows = dict(
            kv_end=torch.tensor([131, 250], dtype=torch.int32), kv_start=torch.tensor([9, 0], dtype=torch.int32)
        )
        expected = emulated.forward(query, key, value, CAUSAL, **rows)
        grads = emulated.backward(query, None, (query, key, value), expected, CAUSAL, **rows)
        for x in (key, value):
            x[0, :, 131:] = torch.nan
            x[1, :, 250:] = torch.nan
        found = emulated.forward(query, key, value, CAUSAL, **rows)
        assert all(map(torch.equal, expected, found))
        assert all(map(torch.equal, grads, emulated.backward(query, None, (query, key, value), found, CAUSAL, **rows)))


def test_equal_calls_give_equal_bits_under_every_schedule(emulated):
    inputs, call = qkv(1, 4, 2, 3, 700, 64), Call(window=(500, 0), sinks=3)
    first = emulated.forward(*inputs, call)
    for seed in (1, 2, 3):
        assert all(map(torch.equal, first, emulated.forward(*inputs, call, seed=seed)))
