"""The long part of the emulated tests of the kernels for compute capability 9.0: planted bugs, schedules, sanitizers.

pytest tests/emulator/full_hopper.py
"""

import pytest
import torch
from emulator.attention import Call
from emulator.checks import check, qkv
from emulator.hopper_checks import SANITIZED, build_hopper, check_forward
from emulator.hopper_planted import MORE_BUGS, STRICT_BUGS, check_is_noticed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_emulated_attention import RELAXED, cases

HEAD_DIMS = (64, 96, 128, 192, 256)
CALLS = (
    Call(window=(130, 7), sinks=3),
    Call(window=(-1, 0), softcap=5.0),
    Call(group=150, shifts=(0, 75), sinks=70, causal=False),
)


@pytest.mark.parametrize("name", MORE_BUGS | STRICT_BUGS)
def test_planted_bug_is_noticed(name, tmp_path):
    check_is_noticed((MORE_BUGS | STRICT_BUGS)[name], tmp_path)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return build_hopper(tmp_path_factory.mktemp("hopper"), "-O2")


@pytest.mark.parametrize("call", CALLS, ids=["window", "causal", "group"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_schedule_is_right(emulated, head_dim, call):
    for seed in range(12):
        dtype = (torch.bfloat16, torch.float16)[seed % 2]
        check_forward(emulated, *qkv(1, 2, 1 + seed % 3 % 2, 390, 430, head_dim, dtype), call, seed=seed)


@settings(max_examples=400, **RELAXED)
@given(cases(), st.sampled_from(HEAD_DIMS), st.booleans(), st.booleans(), st.integers(0, 9))
def test_features_in_combination(emulated, case, head_dim, token_major, half, seed):
    shape, call, sink_logits, rows = case
    inputs = qkv(*shape, head_dim, torch.float16 if half else torch.bfloat16, token_major, seed=seed)
    check_forward(emulated, *inputs, call, sink_logits, seed=seed, **rows)


@pytest.mark.parametrize("flags", SANITIZED)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_race_and_nothing_outside(head_dim, flags, tmp_path):
    emulated = build_hopper(tmp_path, "-g", *flags, head_dim=head_dim)
    documents = torch.tensor([0, 40, 40, 390], dtype=torch.int32)
    start = torch.tensor([13], dtype=torch.int32)
    for seed, call in enumerate(CALLS):
        check_forward(emulated, *qkv(1, 2, 1, 390, 430, head_dim), call, seed=seed)
        check_forward(emulated, *qkv(1, 2, 2, 390, 390, head_dim - 8), call, torch.randn(2), kv_start=start, seed=seed)
        check_forward(emulated, *qkv(1, 2, 2, 390, 390, head_dim), call, cu_seqlens=documents, seed=seed)
        assert not emulated.output


@pytest.fixture(scope="module", params=HEAD_DIMS)
def with_backward(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hopper")
    return request.param, build_hopper(folder, "-O2", head_dim=request.param, backward=True)


@pytest.mark.parametrize("call", CALLS, ids=["window", "causal", "group"])
def test_gradients_are_right_under_every_schedule(with_backward, call):
    head_dim, emulated = with_backward
    for seed in range(8):
        dtype = (torch.bfloat16, torch.float16)[seed % 2]
        check(emulated, *qkv(1, 2, 1 + seed % 3 % 2, 390, 430, head_dim, dtype), call, seed=seed)


@settings(max_examples=150, **RELAXED)
@given(cases(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 9))
def test_gradients_with_features_in_combination(with_backward, case, narrow, token_major, half, seed):
    (head_dim, emulated), (shape, call, sink_logits, rows) = with_backward, case
    dtype = torch.float16 if half else torch.bfloat16
    inputs = qkv(*shape, head_dim - 8 * narrow, dtype, token_major, seed=seed)
    check(emulated, *inputs, call, sink_logits, seed=seed, **rows)


@pytest.mark.parametrize("shape", [(1, 8, 1, 390, 390), (1, 1, 1, 2200, 2200)], ids=["packed", "long"])
def test_gradients_of_packed_heads_and_of_split_sinks(with_backward, shape):
    head_dim, emulated = with_backward
    documents = torch.tensor([0, 40, 40, shape[-1]], dtype=torch.int32)
    for rows in ({}, {"cu_seqlens": documents}):
        check(emulated, *qkv(*shape, head_dim), Call(window=(60, 0), sinks=5), seed=3, **rows)


@pytest.mark.parametrize("flags", SANITIZED)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_race_and_nothing_outside_in_the_backward(head_dim, flags, tmp_path):
    emulated = build_hopper(tmp_path, "-g", *flags, head_dim=head_dim, backward=True)
    documents = torch.tensor([0, 40, 40, 390], dtype=torch.int32)
    for seed, call in enumerate(CALLS):
        check(emulated, *qkv(1, 2, 1, 390, 430, head_dim), call, seed=seed)
        check(emulated, *qkv(1, 2, 2, 390, 390, head_dim - 8), call, torch.randn(2), cu_seqlens=documents, seed=seed)
        assert not emulated.output
    inputs, call = qkv(1, 1, 1, 140, 140, head_dim), Call(window=(70, 0), sinks=2)
    hostile = torch.tensor([-(2**31), 2**31 - 1, 50, -3], dtype=torch.int32)
    for rows in (dict(cu_seqlens=hostile), dict(kv_start=hostile[:1], kv_end=hostile[1:2])):
        saved = emulated.forward(*inputs, call, **rows)
        emulated.backward(inputs[0], None, inputs, saved, call, **rows)
        assert not emulated.output
