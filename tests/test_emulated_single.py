"""The backward of one pass for compute capability 9.0, in the emulator, with blocks that wait for each other.

tests/emulator/full_single.py runs more of the same: every schedule, sanitizer and planted bug.
"""

import pytest
import torch
from emulator.attention import Call
from emulator.checks import check, qkv
from emulator.single_checks import BUGS, build_single, check_all, check_is_noticed, gradients, served
from hypothesis import given, settings
from hypothesis import strategies as st
from test_emulated_attention import RELAXED, cases


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return build_single(tmp_path_factory.mktemp("single"), "-O1")


def products(count, head_dim=64):
    """Counted products of `count` pairs of 64 by 64."""
    return count * (64 // 16) * (64 // 8) * (head_dim // 16)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_gradients_are_right_with_every_kind_of_turn(emulated, blocks):
    emulated.multiprocessors = blocks
    check_all(emulated, seed=blocks)


@settings(max_examples=20, **RELAXED)
@given(cases().map(served), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(1, 4))
def test_gradients_are_right_for_features_in_combination(emulated, case, narrow, token_major, half, seed, blocks):
    shape, call, sink_logits, rows = case
    emulated.multiprocessors = blocks
    dtype = torch.float16 if half else torch.bfloat16
    inputs = qkv(*shape, 56 if narrow else 64, dtype, token_major, seed=seed)
    check(emulated, *inputs, call, sink_logits, seed=seed, **rows)


def test_equal_calls_give_equal_bits_under_every_schedule_and_number_of_blocks(emulated):
    emulated.multiprocessors = 3
    first = gradients(emulated, Call(window=(200, 5)), (1, 2, 1, 500, 500), 0)
    for seed, blocks in ((1, 3), (2, 2), (3, 4), (4, 1)):
        emulated.multiprocessors = blocks
        again = gradients(emulated, Call(window=(200, 5)), (1, 2, 1, 500, 500), seed)
        assert all(map(torch.equal, first, again))


def test_pairs_of_tiles_take_five_products_and_ends_are_trimmed(emulated):
    """Products equal the closed form, over pairs of 64 keys and 64 queries; tiles of queries lie on a common grid."""
    sq, left = 500, 127
    gradients(emulated, Call(window=(left, 0)), (1, 1, 1, sq, sq), 0)
    pairs = 0
    for first in range(0, sq, 64):
        last = min(first + 64, sq) - 1
        pairs += sum(tile <= last + left and tile + 64 > first for tile in range(0, sq, 64))
    assert emulated.counters["mma"] == products(5 * pairs)


def test_who_takes_one_pass(emulated):
    """Asked for nothing, calls with many keys a query whose sums are smaller than the gradients; sinks and caches with
    an end never."""
    inputs, packed = qkv(1, 1, 1, 600, 600, 64), qkv(1, 2, 1, 600, 600, 64)

    def executed(call, asked=None, inputs=inputs, **rows):
        emulated.environment.pop("LONGATTN_HOPPER_BACKWARD", None)
        if asked:
            emulated.environment["LONGATTN_HOPPER_BACKWARD"] = asked
        saved = emulated.forward(*inputs, Call(window=(10, 0)))
        emulated.backward(inputs[0], None, inputs, saved, call, **rows)
        emulated.environment["LONGATTN_HOPPER_BACKWARD"] = "one"
        return emulated.counters["mma"]

    narrow, wide = Call(window=(10, 0)), Call(window=(530, 0))
    assert executed(narrow, "one") < executed(narrow, "two") == executed(narrow)
    assert executed(wide) == executed(wide, "one") < executed(wide, "two")
    assert executed(wide, "one", packed) < executed(wide, "two", packed) == executed(wide, inputs=packed)
    ends = torch.tensor([600], dtype=torch.int32)
    assert executed(wide, "one", kv_end=ends) == executed(wide, "two", kv_end=ends)
    sinks = Call(window=(530, 0), sinks=2)
    assert executed(sinks, "one") == executed(sinks, "two")


def test_queries_without_keys_have_no_gradient(emulated):
    emulated.multiprocessors = 2
    start = torch.tensor([300, 70], dtype=torch.int32)
    check(emulated, *qkv(2, 2, 2, 300, 300, 64), Call(window=(20, 0)), torch.randn(2), kv_start=start)
    check(emulated, *qkv(1, 1, 1, 200, 200, 64), Call(window=(20, 0), query_start=900, key_start=0))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (6, 2), (64, 1)])
def test_gradients_of_heads_that_share_keys(emulated, heads, kv_heads):
    emulated.multiprocessors = 3
    shifts = (0, 50) * (heads // 2) if heads < 9 else (0,) * (heads // 2) + (50,) * (heads // 2)
    check(emulated, *qkv(1, heads, kv_heads, 150, 290, 64), Call(group=100, shifts=shifts), seed=2)
    check(emulated, *qkv(1, heads, kv_heads, 150, 290, 64), Call(window=(140, 0)), torch.randn(heads), seed=1)


def test_documents_in_no_order_end(emulated):
    emulated.multiprocessors = 3
    inputs, call = qkv(1, 1, 1, 420, 420, 64), Call(window=(70, 0))
    for borders in ([-(2**31), 2**31 - 1, 50, -3], [0, 300, 100, 420], [420, 200, 0]):
        rows = {"cu_seqlens": torch.tensor(borders, dtype=torch.int32)}
        saved = emulated.forward(*inputs, call, **rows)
        emulated.backward(inputs[0], None, inputs, saved, call, **rows)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_noticed(name, tmp_path):
    check_is_noticed(BUGS[name], tmp_path)
