"""The long part of the emulated tests: every planted bug, schedules, head dims under the sanitizers.

pytest tests/emulator/full_matrix.py
"""

import pytest
import torch
from emulator.attention import Call, build_driver, shared_driver
from emulator.checks import check, qkv
from emulator.planted import MORE_BUGS, check_is_noticed

LENGTHS = ((190, 230), (3, 700), (40, 300))  # queries and keys: the kernel for many, and both tiles of that for few
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
SCHEDULES = range(8)
CALLS = (
    Call(window=(90, 7), sinks=3),
    Call(window=(-1, 0), softcap=5.0),
    Call(group=50, shifts=(0, 25), sinks=70, causal=False),
)


@pytest.mark.parametrize("name", MORE_BUGS)
def test_planted_bug_is_noticed(name, tmp_path):
    check_is_noticed(MORE_BUGS[name], tmp_path)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return shared_driver(tmp_path_factory)


@pytest.mark.parametrize("call", CALLS, ids=["window", "causal", "group"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=["many", "few", "some"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_schedule_is_right(emulated, head_dim, lengths, call):
    for seed in SCHEDULES:
        dtype = (torch.bfloat16, torch.float16)[seed % 2]
        check(emulated, *qkv(1, 2, 1, *lengths, head_dim, dtype), call, seed=seed)


@pytest.mark.parametrize("head_dim", [8, 40, 72, 80, 100, 160, 200])
def test_other_head_dims_are_padded_inside_the_kernels(emulated, head_dim):
    for lengths in LENGTHS:
        for seed, call in enumerate(CALLS):
            check(emulated, *qkv(1, 2, 1, *lengths, head_dim), call, torch.randn(2), seed=seed)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_race_and_nothing_outside(head_dim, sanitizer, tmp_path):
    flags = ("-O1", "-g", f"-DLONGATTN_ONLY_HEAD_DIM={head_dim}", f"-fsanitize={sanitizer}")
    emulated = build_driver(tmp_path, *flags)
    start = torch.tensor([13], dtype=torch.int32)
    for call in CALLS:
        check(emulated, *qkv(1, 2, 1, 150, 170, head_dim), call, seed=1)
        check(emulated, *qkv(1, 2, 1, 65, 65, head_dim - 5), call, torch.randn(2), kv_start=start)
        check(emulated, *qkv(1, 2, 1, 3, 400, head_dim), call, seed=2)
        check(emulated, *qkv(1, 2, 1, 33, 200, head_dim - 5), call, torch.randn(2), kv_start=start)
    documents = torch.tensor([0, 40, 40, 150], dtype=torch.int32)
    check(emulated, *qkv(1, 2, 1, 150, 150, head_dim), CALLS[0], cu_seqlens=documents)
    documents = torch.tensor([0, 20, 2100], dtype=torch.int32)
    check(emulated, *qkv(1, 1, 1, 2100, 2100, head_dim), CALLS[0], cu_seqlens=documents)
