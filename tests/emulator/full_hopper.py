"""The long part of the emulated tests of the kernels for compute capability 9.0: planted bugs, schedules, sanitizers.

pytest tests/emulator/full_hopper.py
"""

import pytest
import torch
from emulator.attention import Call
from emulator.checks import qkv
from emulator.hopper_checks import build_hopper, check_forward
from emulator.hopper_planted import MORE_BUGS, check_is_noticed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_emulated_attention import RELAXED, cases

HEAD_DIMS = (64, 96, 128, 192, 256)
CALLS = (
    Call(window=(130, 7), sinks=3),
    Call(window=(-1, 0), softcap=5.0),
    Call(group=150, shifts=(0, 75), sinks=70, causal=False),
)


@pytest.mark.parametrize("name", MORE_BUGS)
def test_planted_bug_is_noticed(name, tmp_path):
    check_is_noticed(MORE_BUGS[name], tmp_path)


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


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_race_and_nothing_outside(head_dim, sanitizer, tmp_path):
    emulated = build_hopper(tmp_path, "-O1", "-g", f"-fsanitize={sanitizer}", head_dim=head_dim)
    documents = torch.tensor([0, 40, 40, 390], dtype=torch.int32)
    start = torch.tensor([13], dtype=torch.int32)
    for seed, call in enumerate(CALLS):
        check_forward(emulated, *qkv(1, 2, 1, 390, 430, head_dim), call, seed=seed)
        check_forward(emulated, *qkv(1, 2, 2, 390, 390, head_dim - 8), call, torch.randn(2), kv_start=start, seed=seed)
        check_forward(emulated, *qkv(1, 2, 2, 390, 390, head_dim), call, cu_seqlens=documents, seed=seed)
        assert not emulated.output
