"""The CUDA attention kernels, compiled with g++ against the emulator: results, memory traffic, races and bounds.

tests/emulator/full_matrix.py runs more of the same: every schedule, head dim and planted bug.
"""

import pytest
import torch
from emulator.attention import Call, build_driver, shared_driver
from emulator.checks import ONE_HEAD_DIM, check, check_nan, qkv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

RELAXED = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return shared_driver(tmp_path_factory)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_results_and_gradients_are_right_for_every_head_dim(emulated, head_dim, dtype):
    check(emulated, *qkv(1, 2, 1, 150, 170, head_dim, dtype), Call(window=(70, 3), sinks=4), seed=1)


@pytest.mark.parametrize("head_dim", [1, 8, 20, 40, 72, 81, 100, 160, 200])
def test_other_head_dims_are_padded_inside_the_kernel(emulated, head_dim):
    check(emulated, *qkv(1, 2, 2, 70, 70, head_dim), Call(window=(30, 0)))


@st.composite
def cases(draw):
    """(shape, Call, sink logits, rows) with every feature drawn independently of the others, where they may meet."""
    batch, kv_heads, ratio = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3]))
    sq = draw(st.sampled_from([1, 2, 17, 64, 65, 130, 200]))
    kind = draw(st.sampled_from(["plain", "longer", "documents", "rows", "shard"]))
    sk = sq + (draw(st.integers(0, 150)) if kind in ("longer", "rows") else 0)
    rows, start = {}, {}
    if kind == "documents":
        batch = 1
        borders = sorted(draw(st.lists(st.integers(0, sq), max_size=4)))
        rows["cu_seqlens"] = torch.tensor([0, *borders, sq], dtype=torch.int32)
    if kind == "rows":
        for name in draw(st.sampled_from([("kv_start",), ("kv_end",), ("kv_start", "kv_end")])):
            rows[name] = torch.tensor([draw(st.integers(0, sk)) for _ in range(batch)], dtype=torch.int32)
    if kind == "shard":
        sk = draw(st.integers(1, 200))
        start = {"query_start": draw(st.integers(0, 300)), "key_start": draw(st.integers(0, 300))}
    options = dict(
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])), sinks=draw(st.sampled_from([0, 0, 1, 4, 70])),
        scale=draw(st.sampled_from([None, None, 0.3, -0.2, 0.0])), **start,
    )  # fmt: skip
    if draw(st.booleans()):
        call = Call(window=(draw(st.integers(-1, 150)), draw(st.integers(-1, 90))), **options)
    else:
        size = draw(st.integers(1, 150))
        shifts = tuple(draw(st.integers(0, size - 1)) for _ in range(kv_heads * ratio))
        call = Call(group=size, shifts=shifts, causal=draw(st.booleans()), **options)
    sinks = torch.randn(kv_heads * ratio) if draw(st.booleans()) else None
    return (batch, kv_heads * ratio, kv_heads, sq, sk), call, sinks, rows


@settings(max_examples=80, **RELAXED)
@given(cases(), st.sampled_from([16, 64, 80]), st.booleans(), st.booleans(), st.integers(0, 3))
def test_results_and_gradients_are_right_for_features_in_combination(emulated, case, head_dim, token_major, half, seed):
    shape, call, sink_logits, rows = case
    emulated.multiprocessors = (8, 1, 40, 132)[seed]  # which decides how decoding is split
    dtype = torch.float16 if half else torch.bfloat16
    query, key, value = qkv(*shape, head_dim, dtype, token_major, seed=seed)
    check(emulated, query, key, value, call, sink_logits, seed=seed, **rows)


def test_nan_comes_out_as_nan(emulated):
    check_nan(emulated, 100, 130)


def test_rows_that_see_no_key_give_zero_and_minus_infinity(emulated):
    start = torch.tensor([100, 7], dtype=torch.int32)
    for sink_logits in (None, torch.tensor([0.5, -2.0])):
        inputs, call = qkv(2, 2, 2, 100, 100, 64), Call(window=(20, 0))
        check(emulated, *inputs, call, sink_logits, kv_start=start)
        out, lse = emulated.forward(*inputs, call, sink_logits=sink_logits, kv_start=start)
        assert not out[0].any() and not out[1, :, :7].any()
        expected = -torch.inf if sink_logits is None else sink_logits[:, None].expand(2, 100)
        assert torch.equal(lse[0], torch.as_tensor(expected).expand(2, 100))


def test_strides_of_any_kind_are_read_in_place(emulated):
    """Slices, gaps and odd offsets: memory between the rows holds NaNs, which nothing may touch."""
    call = Call(window=(25, 0))
    for width, head_dim in ((72, 64), (67, 64), (41, 40)):
        wide = torch.full((1, 90, 3, 2, width), torch.nan, dtype=torch.bfloat16)
        query, key, value = (wide[:, :, i, :, :head_dim].transpose(1, 2) for i in range(3))
        for x in (query, key, value):
            x.copy_(torch.randn(x.shape))
        check(emulated, query, key, value, call)


def test_work_and_traffic_are_those_of_the_band(emulated):
    """Tiles, products and bytes equal the closed form of a window: blocks of 128 rows, tiles of 64, warps of 32."""
    sq, left, head_dim, heads = 512, 127, 64, 2
    emulated.forward(*qkv(1, heads, 1, sq, sq, head_dim), Call(window=(left, 0)))
    blocks = [(q, max(0, q - left)) for q in range(0, sq, 128)]
    tiles = {q: -(-(q + 128 - low) // 64) for q, low in blocks}
    keys = sum(q + 128 - low for q, low in blocks)  # no key that a tile holds beyond what its queries see
    assert emulated.counters["bytes_read"] == heads * 2 * head_dim * (sq + 2 * keys)
    assert emulated.counters["bytes_written"] == heads * 2 * head_dim * sq
    products = 0
    for q, low in blocks:
        for warp in range(q, q + 128, 32):
            for tile in range(low, low + 64 * tiles[q], 64):
                products += tile < warp + 32 and tile + 64 > max(0, warp - left)
    assert emulated.counters["mma"] == heads * products * 2 * (32 // 16) * (64 // 8) * (head_dim // 16)


def test_groups_cost_what_a_window_of_their_area_does(emulated):
    sq, size = 1024, 256
    inputs = qkv(1, 2, 1, sq, sq, 64)
    emulated.forward(*inputs, Call(group=size, shifts=(0, size // 2)))
    group = emulated.counters["mma"]
    emulated.forward(*inputs, Call(window=(size // 2 - 1, 0)))
    assert group <= emulated.counters["mma"]


def test_gradients_of_split_sinks_are_summed_over_all_chunks(emulated):
    check(emulated, *qkv(1, 1, 1, 2100, 2100, 32), Call(window=(100, 0), sinks=5))


def test_sinks_of_documents_are_split_too(emulated):
    """Documents that begin in a chunk of queries or at its border, and span several; no block takes all their sinks."""
    documents = torch.tensor([0, 40, 40, 600, 1024, 3300, 3310, 3400], dtype=torch.int32)
    check(emulated, *qkv(1, 1, 1, 3400, 3400, 32), Call(window=(1500, 0), sinks=5), cu_seqlens=documents)
    check(emulated, *qkv(1, 2, 1, 3400, 3400, 32), Call(window=(100, 0), sinks=5), cu_seqlens=documents)
    tiles = 2 * ((100 + 64 + 1024) // 32 + 2)  # of 32 queries, of both heads: the band and less than a chunk
    assert emulated.counters["most_mma"] <= tiles * 4 * 4 * (32 // 16) * (32 // 8)


def test_sinks_of_padded_rows_are_split_too(emulated):
    start = torch.tensor([1030], dtype=torch.int32)
    check(emulated, *qkv(1, 1, 1, 2200, 2200, 32), Call(window=(100, 0), sinks=5), kv_start=start)


def test_equal_calls_give_equal_bits_under_every_schedule(emulated):
    inputs, call = qkv(1, 2, 1, 200, 200, 64), Call(window=(90, 5), sinks=3)
    saved = emulated.forward(*inputs, call)
    grads = emulated.backward(inputs[0], None, inputs, saved, call)
    for seed in (1, 2, 3):
        assert all(map(torch.equal, saved, emulated.forward(*inputs, call, seed=seed)))
        assert all(map(torch.equal, grads, emulated.backward(inputs[0], None, inputs, saved, call, seed=seed)))


SMALL = (qkv(1, 1, 1, 140, 140, 32), Call(window=(70, 0), sinks=2))
SPLIT = (qkv(1, 6, 2, 3, 300, 32), Call(window=(-1, 0)))


@pytest.fixture(scope="module")
def racing(tmp_path_factory):
    return build_driver(tmp_path_factory.mktemp("thread"), *ONE_HEAD_DIM, "-fsanitize=thread")


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    return build_driver(tmp_path_factory.mktemp("address"), *ONE_HEAD_DIM, "-fsanitize=address,undefined")


def test_no_two_threads_race(racing):
    for seed in (0, 1):
        for inputs, call in (SMALL, SPLIT):
            check(racing, *inputs, call, seed=seed)
        assert "data race" not in racing.output


def test_nothing_outside_a_tensor_is_touched(bounded):
    check(bounded, *SMALL[0], SMALL[1])
    check(bounded, *SPLIT[0], SPLIT[1])
    check(bounded, *qkv(1, 6, 2, 33, 205, 27), Call(window=(-1, 0)))
    hostile = torch.tensor([-(2**31), 2**31 - 1, 50, -3], dtype=torch.int32)
    for inputs, call in (SMALL, SPLIT):
        for rows in (
            dict(cu_seqlens=hostile),
            dict(kv_start=hostile[1:2]),
            dict(kv_start=hostile[:1], kv_end=hostile[1:2]),
        ):
            saved = bounded.forward(*inputs, call, **rows)
            bounded.backward(inputs[0], None, inputs, saved, call, **rows)
    assert "ERROR" not in bounded.output
