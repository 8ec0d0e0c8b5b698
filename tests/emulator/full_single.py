"""The long part of the emulated tests of the backward of one pass: planted bugs, schedules, sanitizers.

pytest tests/emulator/full_single.py
"""

import pytest
import torch
from emulator.attention import Call
from emulator.checks import check, qkv
from emulator.hopper_checks import SANITIZED
from emulator.single_checks import MORE_BUGS, build_single, check_all, check_is_noticed, gradients, served
from hypothesis import given, settings
from hypothesis import strategies as st
from test_emulated_attention import RELAXED, cases

CALLS = (
    Call(window=(130, 7)),
    Call(window=(-1, 0), softcap=5.0),
    Call(group=150, shifts=(0, 75), causal=False),
)


@pytest.mark.parametrize("name", MORE_BUGS)
def test_planted_bug_is_noticed(name, tmp_path):
    check_is_noticed(MORE_BUGS[name], tmp_path)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return build_single(tmp_path_factory.mktemp("single"), "-O2")


@pytest.mark.parametrize("call", CALLS, ids=["window", "causal", "group"])
def test_every_schedule_is_right(emulated, call):
    for seed in range(12):
        dtype, emulated.multiprocessors = (torch.bfloat16, torch.float16)[seed % 2], 1 + seed % 5
        check(emulated, *qkv(1, 2, 1 + seed % 3 % 2, 590, 630, 64, dtype), call, seed=seed)


@settings(max_examples=150, **RELAXED)
@given(cases().map(served), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 9), st.integers(1, 6))
def test_features_in_combination(emulated, case, narrow, token_major, half, seed, blocks):
    shape, call, sink_logits, rows = case
    emulated.multiprocessors = blocks
    dtype = torch.float16 if half else torch.bfloat16
    inputs = qkv(*shape, 64 - 8 * narrow, dtype, token_major, seed=seed)
    check(emulated, *inputs, call, sink_logits, seed=seed, **rows)


@pytest.mark.parametrize("call", CALLS, ids=["window", "causal", "group"])
def test_equal_calls_give_equal_bits(emulated, call):
    emulated.multiprocessors = 1
    first = gradients(emulated, call, (2, 2, 1, 600, 600), 0)
    for seed in range(1, 10):
        emulated.multiprocessors = 1 + seed % 6
        assert all(map(torch.equal, first, gradients(emulated, call, (2, 2, 1, 600, 600), seed)))


@pytest.mark.parametrize("flags", SANITIZED)
def test_no_race_and_nothing_outside(flags, tmp_path):
    emulated = build_single(tmp_path, "-g", "-DLONGATTN_ONLY_BF16", *flags)
    documents = torch.tensor([0, 40, 40, 390], dtype=torch.int32)
    start = torch.tensor([13], dtype=torch.int32)
    for seed, call in enumerate(CALLS):
        emulated.multiprocessors = 2 + seed
        check_all(emulated, seed)
        check(emulated, *qkv(1, 2, 1, 390, 430, 64), call, kv_start=start, seed=seed)
        check(emulated, *qkv(1, 2, 2, 390, 390, 56), call, torch.randn(2), cu_seqlens=documents, seed=seed)
        assert not emulated.output
    inputs, call = qkv(1, 1, 1, 140, 140, 64), Call(window=(70, 0))
    hostile = torch.tensor([-(2**31), 2**31 - 1, 50, -3], dtype=torch.int32)
    for rows in (dict(cu_seqlens=hostile), dict(kv_start=hostile[:1]), dict(kv_start=hostile[1:2])):
        saved = emulated.forward(*inputs, call, **rows)
        emulated.backward(inputs[0], None, inputs, saved, call, **rows)
        assert not emulated.output
