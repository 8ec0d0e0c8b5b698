"""The compiled CPU kernels: lengths that fill blocks and strips, threads, instruction sets, guarded memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import check_against_dense, half_shifts, visible_mask

import longattn
from longattn.ops import dispatch

ISA = getattr(dispatch.compiled_module(), "cpu_isa", lambda: "none")()
ISAS = ["none", "avx2", "avx512", "avx512_bf16", "amx"]
pytestmark = pytest.mark.skipif(ISA == "none", reason="no compiled attention for this processor")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(batch=1, heads=4, kv_heads=2, sq=65, sk=65, dim=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, sq, dim), (batch, kv_heads, sk, dim), (batch, kv_heads, sk, dim))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def random_call(choose):
    """An op, its band and options, the tensors, and the mask that says what it should see."""
    batch, kv_heads, group = choose.choice([(1, 1, 1), (2, 1, 2), (1, 2, 3)])
    heads, length, dim = group * kv_heads, choose.choice([700, 1111, 1500]), choose.choice([8, 40, 64, 128])
    q, k, v = tensors(batch, heads, kv_heads, length, length, dim, choose.choice(DTYPES), choose.randrange(99))
    rows = {}
    if choose.random() < 0.3:
        start = [choose.randrange(length) for _ in range(batch)]
        rows["kv_start"] = torch.tensor(start, dtype=torch.int32)
    elif batch == 1 and choose.random() < 0.4:
        borders = sorted([0, length, *(choose.randrange(length) for _ in range(4))])
        rows["cu_seqlens"] = torch.tensor(borders, dtype=torch.int32)
    options = dict(sink_tokens=choose.choice([0, 3, 70]), softcap=choose.choice([0.0, 0.0, 2.0]))
    mask = dict(sinks=options["sink_tokens"], **rows)
    if choose.random() < 0.5:
        window = choose.choice([(0, 0), (30, 0), (127, 5), (300, 0), (-1, 0), (-1, -1), (5, -1)])
        mask = visible_mask(batch, heads, length, length, window=window, **mask)
        return longattn.window_attention, (window,), {**options, **rows}, (q, k, v), mask
    size, causal = choose.choice([1, 17, 100, 512]), choose.random() < 0.7
    shift = choose.randrange(size)
    shifts = half_shifts(heads, shift)
    mask = visible_mask(batch, heads, length, length, group=size, shifts=shifts, causal=causal, **mask)
    return longattn.group_attention, (size,), dict(shift=shift, causal=causal, **options, **rows), (q, k, v), mask


@pytest.mark.parametrize("seed", range(16))
def test_long_calls_match_reference(seed):
    choose = random.Random(seed)
    op, band, options, inputs, mask = random_call(choose)
    logits = torch.randn(inputs[0].shape[1]) if choose.random() < 0.3 else None

    def attend(query, key, value, sink_logits):
        return op(query, key, value, *band, sink_logits=sink_logits, return_lse=True, **options)

    with longattn.force("compiled"):
        use_lse = choose.random() < 0.5
        check_against_dense(attend, *inputs, mask, softcap=options["softcap"], sink_logits=logits, use_lse=use_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sq, group", [(1, 1), (1, 4), (1, 16), (3, 5), (4, 2)])
def test_decoding_matches_reference(dtype, sq, group):
    for sk, window in ((5, (-1, 0)), (1023, (-1, 0)), (2100, (700, 0)), (1500, (40, 0))):
        q, k, v = tensors(2, 2 * group, 2, sq, sk, 40, dtype)
        rows = dict(kv_start=torch.tensor([0, sk // 3], dtype=torch.int32))
        rows["kv_end"] = torch.tensor([sk, max(sq, sk - 7)], dtype=torch.int32)
        mask = visible_mask(2, 2 * group, sq, sk, window=window, sinks=3, **rows)
        logits = torch.linspace(-1, 1, 2 * group)

        def attend(query, key, value, sink_logits, window=window, rows=rows):
            options = dict(sink_tokens=3, sink_logits=sink_logits, return_lse=True)
            return longattn.window_attention(query, key, value, window, **options, **rows)

        with longattn.force("compiled"):
            check_against_dense(attend, q, k, v, mask, sink_logits=logits)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(op, band, options, inputs, logits):
    """Output, log-sum-exp and all gradients of one call."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, logits)]
    out, lse = op(*leaves[:3], *band, sink_logits=leaves[3], return_lse=True, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, lse, *torch.autograd.grad((out, lse.nan_to_num(neginf=0.0)), leaves, (grad, lse.detach().sigmoid()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, sq, sk, window", [(1, 3000, 3000, 200), (4, 900, 900, (-1, 0)), (4, 1, 5000, (-1, 0))])
def test_any_number_of_threads_gives_the_same_bits(dtype, heads, sq, sk, window, threads):
    inputs = tensors(1, heads, 1, sq, sk, 64, dtype)
    runs = []
    for count in (1, 2, 3, 7):
        threads(count)
        with longattn.force("compiled"):
            options = dict(sink_tokens=2)
            runs.append(results(longattn.window_attention, (window,), options, inputs, torch.zeros(heads)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


PROGRAM = """
import sys
from longattn.ops import dispatch
import test_compiled_attention as tests
assert dispatch.compiled_module().cpu_isa() == sys.argv[1], dispatch.compiled_module().cpu_isa()
for seed in (3, 5, 8):
    tests.test_long_calls_match_reference(seed)
for dtype in tests.DTYPES:
    tests.test_decoding_matches_reference(dtype, 1, 4)
"""


def run_capped(isa, program, *arguments):
    """Run a program in this folder, in a process that may use no more than `isa`."""
    environment = {**os.environ, "LONGATTN_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *arguments]
    folder = Path(__file__).parent
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("isa", ISAS[1:])
def test_each_instruction_set_matches_reference(isa):
    if ISAS.index(isa) > ISAS.index(ISA):
        pytest.skip(f"this processor, or LONGATTN_CPU_ISA, ends at {ISA}")
    run_capped(isa, PROGRAM, isa)


WITHOUT = """
import torch, longattn
x = torch.zeros(1, 2, 4, 8)
assert "allows neither AVX2 nor AVX-512" in longattn.which("window_attention", x, x, x, 4).reason
assert longattn.window_attention(x, x, x, 4).shape == x.shape
"""


def test_no_instruction_set_means_the_pure_path():
    run_capped("none", WITHOUT)


@pytest.mark.parametrize(
    "dtype, dim, reason",
    [
        (torch.float64, 64, "compiled for float32, bfloat16 and float16, not float64"),
        (torch.float32, 12, "multiples of 8 up to 256, not 12"),
        (torch.float32, 264, "multiples of 8 up to 256, not 264"),
    ],
)
def test_which_says_why_a_call_is_not_compiled(dtype, dim, reason):
    x = torch.zeros(1, 2, 4, dim, dtype=dtype)
    choice = longattn.which(longattn.window_attention, x, x, x, 4)
    assert choice.path == "pure" and reason in choice.reason
    assert longattn.which(longattn.group_attention, *(torch.zeros(1, 2, 4, 64),) * 3, 4).path == "compiled"


class Guarded:
    """Copies of tensors that end (or begin) where a page begins (or ends) that can't be read or written."""

    def __init__(self, at_end):
        self.at_end, self.maps = at_end, []

    def __call__(self, x):
        page, size = mmap.PAGESIZE, x.numel() * x.element_size()
        pages = (size + page - 1) // page + 2
        memory = mmap.mmap(-1, pages * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for guard in (base, base + (pages - 1) * page):
            assert protect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
        offset = (pages - 1) * page - size if self.at_end else page
        self.maps.append(memory)
        bits = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset) if size else x
        copy = bits.view(x.dtype).view(x.shape)
        return copy.copy_(x)


GUARDED = """
import torch
import longattn
import test_compiled_attention as tests
for at_end in (True, False):
    guarded = tests.Guarded(at_end)
    for dtype in tests.DTYPES:
        for dim, sq, sk in ((8, 1, 1), (8, 37, 37), (40, 1, 77), (64, 33, 70), (72, 300, 300), (256, 13, 29)):
            q, k, v = (guarded(x) for x in tests.tensors(1, 2, 1, sq, sk, dim, dtype))
            logits = guarded(torch.zeros(2))
            with longattn.force("compiled"):
                start = guarded(torch.tensor([sk // 4], dtype=torch.int32))
                options = dict(sink_tokens=2, kv_start=start)
                got = tests.results(longattn.window_attention, (9,), options, (q, k, v), logits)
            outs = [guarded(torch.zeros(x.shape, dtype=x.dtype)) for x in got]
            rest = (0.3, 0.0, 2, logits, None, start, None, sk - sq, 0)
            run = torch.ops.longattn
            run._window_fwd(q, k, v, 8, 0, *rest, outs[0], outs[1])
            run._window_bwd(outs[0], None, q, k, v, outs[0], outs[1], 8, 0, *rest, *outs[2:])
            assert all(x.isfinite().all() for x in (outs[0], *outs[2:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
@pytest.mark.parametrize("isa", ISAS[1:])
def test_nothing_outside_the_tensors_is_touched(isa):
    if ISAS.index(isa) > ISAS.index(ISA):
        pytest.skip(f"this processor, or LONGATTN_CPU_ISA, ends at {ISA}")
    run_capped(isa, GUARDED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_no_query_sees_are_not_read(dtype):
    q, k, v = tensors(1, 4, 2, 70, 200, 64, dtype)
    with longattn.force("compiled"):
        end, start = (torch.tensor([x], dtype=torch.int32) for x in (150, 30))
        expected = longattn.window_attention(q, k, v, (-1, 0), kv_start=start, kv_end=end)
        k[:, :, 150:], v[:, :, :30] = float("nan"), float("inf")
        assert torch.equal(longattn.window_attention(q, k, v, (-1, 0), kv_start=start, kv_end=end), expected)
        last = longattn.window_attention(q[:, :, -1:], k, v, (-1, 0), kv_start=start, kv_end=end)
    torch.testing.assert_close(last, expected[:, :, -1:], rtol=2e-2, atol=2e-2)
