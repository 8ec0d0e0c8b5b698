"""The kernels for compute capability 9.0, compiled with g++ against the emulator of mbarriers, copies and wgmma.

tests/emulator/full_hopper.py runs more of the same: every schedule, head dim and planted bug.
"""

from types import SimpleNamespace

import pytest
import torch
from emulator.attention import Call
from emulator.checks import check, check_nan, qkv
from emulator.hopper_checks import build_hopper, check_forward
from emulator.hopper_planted import BUGS, check_is_noticed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_emulated_attention import RELAXED, cases

from longattn.ops.hopper import kernel_note, why_not_hopper


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return build_hopper(tmp_path_factory.mktemp("hopper"), "-O1")


@pytest.fixture(scope="module")
def with_backward(tmp_path_factory):
    """Both directions of head dim 64."""
    return build_hopper(tmp_path_factory.mktemp("hopper"), "-O1", head_dim=64, backward=True)


@pytest.fixture(scope="module", params=[192, 256])
def wide(request, tmp_path_factory):
    """Both directions of a head dim of which two warpgroups share the sums of dK and dV."""
    folder = tmp_path_factory.mktemp("hopper")
    return request.param, build_hopper(folder, "-O1", head_dim=request.param, backward=True)


@pytest.mark.parametrize("head_dim", [40, 64, 88, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_results_are_right_for_every_head_dim(emulated, head_dim, dtype):
    check_forward(emulated, *qkv(1, 2, 1, 190, 230, head_dim, dtype), Call(window=(90, 7), sinks=3), seed=1)


def test_nan_comes_out_as_nan(emulated):
    check_nan(emulated, 100, 130)


@settings(max_examples=40, **RELAXED)
@given(cases(), st.sampled_from([64, 80, 128]), st.booleans(), st.booleans(), st.integers(0, 3))
def test_results_are_right_for_features_in_combination(emulated, case, head_dim, token_major, half, seed):
    shape, call, sink_logits, rows = case
    inputs = qkv(*shape, head_dim, torch.float16 if half else torch.bfloat16, token_major, seed=seed)
    check_forward(emulated, *inputs, call, sink_logits, seed=seed, **rows)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (6, 1), (4, 2), (64, 1)])
def test_heads_that_share_keys_share_tiles(emulated, heads, kv_heads):
    """A packed tile reads K and V once for all of its heads: the fewer bytes, the more of them."""
    inputs = qkv(1, heads, kv_heads, 200, 200, 64)
    check_forward(emulated, *inputs, Call(window=(50, 0)), torch.randn(heads))
    packed = heads // kv_heads & -(heads // kv_heads)  # the largest power of two that divides the ratio
    rows, tiles = 192 // packed, 0
    for first in reversed(range(0, 200, rows)):
        last = min(first + rows, 200) - 1
        tiles += -(-(last + 1 - max(0, first - 50)) // 64)
    moved = emulated.counters["bytes_read"] - 2 * 64 * heads * 200
    assert moved <= tiles * 64 * 2 * 2 * 64 * (heads // packed)
    assert moved >= (tiles - -(-200 // rows)) * 64 * 2 * 2 * 64 * (heads // packed)


def test_heads_whose_shifts_differ_do_not_share_tiles(emulated):
    for shifts in ((0, 0, 20, 20), (0, 20, 0, 20), (5, 5, 5, 20)):
        check_forward(emulated, *qkv(1, 4, 1, 150, 150, 64), Call(group=40, shifts=shifts, sinks=2))


def test_rows_that_see_no_key_give_zero_and_minus_infinity(emulated):
    start = torch.tensor([100, 7], dtype=torch.int32)
    for sink_logits in (None, torch.tensor([0.5, -2.0])):
        out, lse = check_forward(
            emulated, *qkv(2, 2, 2, 100, 100, 64), Call(window=(20, 0)), sink_logits, kv_start=start
        )
        assert not out[0].any() and not out[1, :, :7].any()
        expected = -torch.inf if sink_logits is None else sink_logits[:, None].expand(2, 100)
        assert torch.equal(lse[0], torch.as_tensor(expected).expand(2, 100))


@pytest.mark.parametrize("head_dim", [64, 96])
def test_slots_of_a_cache_that_were_never_written_do_not_matter(emulated, head_dim):
    query, key, value = qkv(2, 2, 1, 150, 400, head_dim)
    ends = torch.tensor([333, 60], dtype=torch.int32)
    for row, end in enumerate(ends):
        key[row, :, end:], value[row, :, end:] = 0.0, 0.0
    call = Call(window=(100, 20), sinks=2)
    expected = check_forward(emulated, query, key, value, call, kv_end=ends)
    for row, end in enumerate(ends):
        key[row, :, end:], value[row, :, end:] = torch.nan, torch.nan
    got = emulated.forward(query, key, value, call, kv_end=ends)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("head_dim", [64, 192])
def test_warpgroups_without_rows_keep_in_step(emulated, head_dim):
    """Tiles of which one warpgroup has rows, several a block, with one slot of Q and with two."""
    for seed in range(6):
        check_forward(emulated, *qkv(2, 4, 4, 1, 65, head_dim), Call(window=(-1, 0)), seed=seed)


def test_warpgroups_leave_out_tiles_that_none_of_their_rows_sees(emulated):
    """Products equal the closed form: blocks of 192 rows, warpgroups of 64, key tiles of 64 from the block's first."""
    sq, left, head_dim = 500, 127, 64
    emulated.forward(*qkv(1, 1, 1, sq, sq, head_dim), Call(window=(left, 0)))
    products = 0
    for block in range(0, sq, 192):
        low = max(0, block - left)
        for first in range(block, min(block + 192, sq), 64):
            last = min(first + 64, sq) - 1
            tiles = range(low, min(block + 192, sq), 64)
            products += sum(tile <= last and tile + 64 > max(0, first - left) for tile in tiles)
    assert emulated.counters["mma"] == products * 2 * (64 // 16) * (64 // 8) * (head_dim // 16)


def test_equal_calls_give_equal_bits_under_every_schedule(emulated):
    inputs, call = qkv(1, 2, 1, 400, 400, 64), Call(window=(90, 5), sinks=3)
    first = emulated.forward(*inputs, call)
    for seed in (1, 2, 3):
        assert all(map(torch.equal, first, emulated.forward(*inputs, call, seed=seed)))


@settings(max_examples=25, **RELAXED)
@given(cases(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 3))
def test_gradients_are_right_for_features_in_combination(with_backward, case, narrow, token_major, half, seed):
    shape, call, sink_logits, rows = case
    dtype = torch.float16 if half else torch.bfloat16
    inputs = qkv(*shape, 56 if narrow else 64, dtype, token_major, seed=seed)
    check(with_backward, *inputs, call, sink_logits, seed=seed, **rows)


def test_gradients_of_heads_that_share_keys(with_backward):
    check(with_backward, *qkv(1, 8, 1, 150, 150, 64), Call(window=(50, 0)), torch.randn(8), seed=1)
    check(with_backward, *qkv(1, 6, 2, 130, 130, 64), Call(group=50, shifts=(0, 25) * 3), seed=2)


def test_gradients_of_sinks_that_later_queries_sum_apart(with_backward):
    documents = torch.tensor([0, 40, 40, 1060], dtype=torch.int32)
    check(with_backward, *qkv(1, 1, 1, 1060, 1060, 64), Call(window=(20, 0), sinks=3), cu_seqlens=documents)


def test_unwritten_slots_of_a_cache_do_not_reach_gradients(with_backward):
    query, key, value = qkv(2, 2, 1, 150, 400, 64)
    ends = torch.tensor([333, 160], dtype=torch.int32)
    for row, end in enumerate(ends):
        key[row, :, end:], value[row, :, end:] = 0.0, 0.0
    call, grads = Call(window=(100, 20), sinks=2), (torch.randn_like(query), None)
    saved = check_forward(with_backward, query, key, value, call, kv_end=ends)
    expected = with_backward.backward(*grads, (query, key, value), saved, call, kv_end=ends)
    for row, end in enumerate(ends):
        key[row, :, end:], value[row, :, end:] = torch.nan, torch.nan
    got = with_backward.backward(*grads, (query, key, value), saved, call, kv_end=ends)
    assert all(map(torch.equal, got, expected))


def test_equal_calls_give_equal_gradients_under_every_schedule(with_backward):
    inputs, call = qkv(1, 4, 1, 260, 260, 64), Call(window=(90, 5), sinks=3)
    saved, grad_out = with_backward.forward(*inputs, call), torch.randn(1, 4, 260, 64).to(torch.bfloat16)
    first = with_backward.backward(grad_out, None, inputs, saved, call)
    for seed in (1, 2, 3):
        again = with_backward.backward(grad_out, None, inputs, saved, call, seed=seed)
        assert all(map(torch.equal, first, again))


def products_of_passes(emulated, head_dim, query_rows, columns, key_rows, of_keys):
    """Multiplications of a causal window by the emulator's count, and by the closed form: 3 products for each pair that
    dQ's warpgroups of 64 rows visit, in tiles of `columns`, `of_keys` for each that those for dK and dV visit."""
    sq, left = 500, 127
    inputs, call = qkv(1, 1, 1, sq, sq, head_dim), Call(window=(left, 0))
    saved, grad_out = emulated.forward(*inputs, call), torch.randn(1, 1, sq, head_dim).to(torch.bfloat16)
    emulated.backward(grad_out, None, inputs, saved, call)
    products = 0
    for first in range(0, sq, 64):
        last = min(first + 64, sq) - 1
        block = first // query_rows * query_rows
        keys = range(max(0, block - left), min(block + query_rows, sq), columns)
        products += 3 * columns * sum(tile <= last and tile + columns > max(0, first - left) for tile in keys)
        block = first // key_rows * key_rows
        queries = range(block, min(block + key_rows + left, sq), 64)
        products += of_keys * 64 * sum(tile <= last + left and tile + 64 > first for tile in queries)
    return emulated.counters["mma"], products * (64 // 16) * head_dim // (8 * 16)


def test_both_passes_leave_out_tiles_that_none_of_their_rows_sees(with_backward):
    counted, expected = products_of_passes(with_backward, 64, query_rows=192, columns=64, key_rows=128, of_keys=4)
    assert counted == expected


def test_two_warpgroups_of_wide_heads_share_a_tile_of_keys(wide):
    """One forms dK and one dV, so that S is formed twice."""
    head_dim, emulated = wide
    columns = 64 if head_dim == 192 else 32
    counted, expected = products_of_passes(emulated, head_dim, query_rows=128, columns=columns, key_rows=64, of_keys=5)
    assert counted == expected


def test_gradients_of_wide_heads(wide):
    head_dim, emulated = wide
    start = torch.tensor([13, 90], dtype=torch.int32)
    check(emulated, *qkv(2, 2, 1, 200, 200, head_dim), Call(window=(40, 3), sinks=2), torch.randn(2), kv_start=start)
    check(emulated, *qkv(1, 6, 2, 130, 150, head_dim - 8, torch.float16), Call(group=50, shifts=(0, 25) * 3), seed=1)
    check(emulated, *qkv(1, 1, 1, 90, 90, head_dim, token_major=True), Call(window=(-1, 0), softcap=5.0), seed=2)


def test_no_two_threads_or_copies_race(tmp_path):
    racing = build_hopper(tmp_path, "-O1", "-g", "-fsanitize=thread", head_dim=64)
    for seed in (0, 1):
        check_forward(racing, *qkv(1, 1, 1, 420, 420, 64), Call(window=(130, 3), sinks=2), seed=seed)
        assert not racing.output


def test_nothing_outside_a_tensor_is_touched(tmp_path):
    bounded = build_hopper(tmp_path, "-O0", "-g", "-fsanitize=address", head_dim=64)
    check_forward(bounded, *qkv(1, 2, 1, 210, 230, 56), Call(window=(70, 0), sinks=2), torch.randn(2))
    hostile = torch.tensor([-(2**31), 2**31 - 1, 50, -3], dtype=torch.int32)
    inputs, call = qkv(1, 1, 1, 140, 140, 64), Call(window=(70, 0), sinks=2)
    for rows in (
        dict(cu_seqlens=hostile),
        dict(kv_start=hostile[1:2]),
        dict(kv_start=hostile[:1], kv_end=hostile[1:2]),
    ):
        bounded.forward(*inputs, call, **rows)
    assert not bounded.output


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_noticed(name, tmp_path):
    check_is_noticed(BUGS[name], tmp_path)


def test_what_it_does_not_serve_is_said_by_the_launchers_rules(emulated):
    wide = torch.randn(1, 2, 70, 96, dtype=torch.bfloat16)
    plain, one = wide[..., :64], wide[:, :1, :, :64]
    inputs = {
        "plain": (plain,) * 3,
        "expanded": (plain, plain, plain[:, :, :1].expand(1, 2, 70, 64)),
        "expanded, but walked once": (one, one, one[:, 0].expand(1, 1, 70, 64)),
        "odd stride": (torch.randn(1, 2, 70, 68, dtype=torch.bfloat16)[..., :64], plain, plain),
        "odd head dim": (wide[..., :60],) * 3,
        "small head dim": (wide[..., :32],) * 3,
        "no key": (plain, plain[:, :, :0], plain[:, :, :0]),
    }
    for name, tensors in inputs.items():
        reason = why_not_hopper(*tensors)
        assert (reason is None) == (name in ("plain", "expanded, but walked once")), name
        if reason is None:
            check_forward(emulated, *tensors, Call(window=(9, 0)))
        else:
            with pytest.raises(AssertionError):
                emulated.forward(*tensors, Call(window=(9, 0)))
            assert emulated.counters["error"] != 0, name
    assert why_not_hopper(wide[..., 4:68], plain, plain) == "tensors that start at multiples of 16 bytes"


def test_which_says_what_runs_where_it_is_asked_for(monkeypatch):
    def note(capability=(9, 0), device="cuda", head_dim=64):
        x = torch.empty(1, 2, 80, head_dim)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        query = SimpleNamespace(device=torch.device(device), shape=x.shape, stride=x.stride, data_ptr=x.data_ptr)
        return kernel_note(query, x, x)

    monkeypatch.delenv("LONGATTN_HOPPER", raising=False)
    assert note() is None
    monkeypatch.setenv("LONGATTN_HOPPER", "1")
    assert note(device="cpu") is None
    assert note() == "forward and backward by the kernels for compute capability 9.0"
    assert note(head_dim=256) == "forward and backward by the kernels for compute capability 9.0"
    assert note((8, 9)) == "LONGATTN_HOPPER has no kernels for compute capability 8.9"
    assert note(head_dim=32) == (
        "the kernels for compute capability 9.0 need a head dim of 33 to 256, so those for 8.0 run"
    )
