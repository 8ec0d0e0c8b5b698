"""The attention ops on a GPU against float64: every feature in combination, long texts, offsets past 32 bits, memory.

Each test runs on CPU tensors too, on fewer or smaller cases, so that its code is known to work.
"""

from __future__ import annotations

import os

import pytest
import torch
from attention_calls import GROUPS, WINDOWS, calls, check_group, check_window
from devices import DEVICES, peak_bytes, serves
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, error
from sampled_reference import Causal, Head

import longattn

pytestmark = pytest.mark.parametrize("device", DEVICES)
HALVES = (torch.bfloat16, torch.float16)
DIMS = (8, 20, 32, 64, 72, 96, 100, 128, 192, 256)
EXAMPLES = {"cpu": 6, "cuda": 150}
CALLS = {
    "cpu": calls(HALVES, low_lengths=(33, 130), dims=DIMS, short_queries=True),
    "cuda": calls(HALVES, low_lengths=(33, 64, 65, 200, 511, 1024), dims=DIMS, short_queries=True),
}


def test_windows_of_every_feature_match_reference(device):
    @settings(max_examples=EXAMPLES[device], deadline=None, derandomize=True)
    @given(call=CALLS[device], window=WINDOWS, use_lse=st.booleans())
    def check(call, window, use_lse):
        check_window(call, window, use_lse=use_lse, device=device)

    check()


def test_groups_of_every_feature_match_reference(device):
    @settings(max_examples=EXAMPLES[device], deadline=None, derandomize=True)
    @given(call=CALLS[device], group=GROUPS, part=st.floats(0, 0.99), causal=st.booleans(), use_lse=st.booleans())
    def check(call, group, part, causal, use_lse):
        check_group(call, group, int(part * group), causal, use_lse=use_lse, device=device)

    check()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
def test_every_head_dim_has_a_kernel_that_is_right(dim, dtype, device):
    serves(device, dtype)
    tokens = 90 if device == "cpu" else 400
    q, k, v = (torch.randn(2, tokens, heads, dim).to(dtype).transpose(1, 2) for heads in (4, 2, 2))
    call = q, k, v, torch.randn(4), dict(sink_tokens=3, softcap=0.0), {}
    check_window(call, (50, 0), use_lse=True, device=device)


def sampled(tokens: int, sinks: int) -> list[int]:
    """64 tokens or so: both ends, two sinks, borders of tiles, and some by chance."""
    chosen = {0, 1, min(sinks, tokens - 1), tokens // 2 // 128 * 128, tokens - 2, tokens - 1}
    return sorted(chosen | set(torch.randint(tokens, (58,)).tolist()))


def check_sampled(inputs, band: Causal, shift: int) -> None:
    """Output, log-sum-exp and gradients of (query, key, value, grad) of one batch row, at sampled rows and columns."""
    query, key, value, grad = inputs
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    if band.window:
        out, lse = longattn.window_attention(*leaves, band.window, sink_tokens=band.sinks, return_lse=True)
    else:
        options = dict(shift=shift, sink_tokens=band.sinks, return_lse=True)
        out, lse = longattn.group_attention(*leaves, band.group, **options)
    grads = torch.autograd.grad(out, leaves, grad)
    tokens, heads = query.shape[2], query.shape[1]
    ratio, places = heads // key.shape[1], sampled(query.shape[2], band.sinks)
    exact, low = [], []
    for results, dtype in ((exact, torch.float64), (low, query.dtype)):
        rows, columns = [], torch.zeros(2, key.shape[1], len(places), key.shape[3], dtype=torch.float64)
        for head in range(heads):
            kv, moved = head // ratio, shift if head >= heads // 2 else 0
            one = Head(query[0, head], key[0, kv], value[0, kv], grad[0, head], band, moved, dtype)
            rows.append(
                [torch.stack([x.double().cpu() for x in parts]) for parts in zip(*map(one.row, places), strict=True)]
            )
            for place, token in enumerate(places):
                columns[:, kv, place] += torch.stack(one.column(token)).cpu()
        results += [torch.stack(parts) for parts in zip(*rows, strict=True)] + list(columns)
    got = [x[0][:, places].cpu() for x in (out, lse, *grads)]
    names = ("out", "lse", "grad_query", "grad_key", "grad_value")
    assert tokens > 1000
    for name, x, ref, rough in zip(names, got, exact, low, strict=True):
        floor = None if name != "lse" else 4e-3
        shared = dict(grad_value=exact[4]) if name.startswith("grad") else {}
        assert_close(name, x.detach(), ref, error(rough, ref), floor=floor, **shared)


BANDS = [
    (Causal(window=1000, sinks=4), 0),
    (Causal(window=128), 0),
    (Causal(group=768), 384),
    (Causal(group=500, sinks=3), 77),
]


@pytest.mark.parametrize("band, shift", BANDS, ids=["W1000+sinks", "W128", "G768+shift", "G500+shift+sinks"])
@pytest.mark.parametrize("dim", [64, 128])
def test_long_texts_match_sampled_rows_and_columns(dim, band, shift, device):
    if device == "cpu" and (dim == 128 or band.window == 1000 or band.group == 768):
        pytest.skip("two of these show that the code runs")
    serves(device, torch.bfloat16)
    tokens = 1500 if device == "cpu" else 1 << 17
    heads = (2, 1, 1, 2) if device == "cpu" else (4, 2, 2, 4)
    inputs = [
        torch.randn(1, tokens, h, dim, device=device, dtype=torch.bfloat16).transpose(1, 2) for h in heads
    ]  # fmt: skip
    check_sampled(inputs, band, shift)


def test_offsets_past_32_bits(device):
    tokens, row = (1100, 8 * 64) if device == "cpu" else (1 << 17, 300 * 64)  # elements from token to token
    memory = torch.randn(1, tokens, row, device=device, dtype=torch.bfloat16)
    assert device == "cpu" or memory.numel() > 1 << 31
    heads = memory.unflatten(-1, (-1, 64)).transpose(1, 2)  # (1, 8 or 300, S, 64)
    inputs = heads[:, -2:], heads[:, -3:-2], heads[:, -4:-3], heads[:, -6:-4]
    check_sampled(inputs, Causal(window=200, sinks=2), 0)


def test_memory_stays_within_a_few_outputs(device):
    tokens = 2048 if device == "cpu" else 1 << 15
    query, key, value = (
        torch.randn(1, tokens, h, 64, device=device, dtype=torch.bfloat16).transpose(1, 2) for h in (8, 2, 2)
    )
    serves(device, torch.bfloat16)
    if longattn.which(longattn.window_attention, query, key, value, 512).path != "compiled":
        pytest.skip("nothing was compiled for this device")
    size = query.numel() * 2
    for options in (dict(), dict(sink_tokens=4)):
        peak = peak_bytes(lambda options=options: longattn.window_attention(query, key, value, 512, **options), device)
        assert size <= peak <= 3 * size
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out = longattn.window_attention(*leaves, 512, **options)
        peak = peak_bytes(lambda out=out, x=leaves: torch.autograd.grad(out, x, out, retain_graph=True), device)
        sums = 2 * size * (os.environ.get("LONGATTN_HOPPER_BACKWARD") == "one")  # 256 bytes a query and head
        assert 1.5 * size <= peak <= 2 * 1.5 * size + sums, "query's gradient and a quarter of it for key and for value"


@pytest.mark.parametrize("dim", [64, 128])
def test_twenty_runs_give_the_same_bits(dim, device):
    tokens = 300 if device == "cpu" else 4000
    inputs = [
        torch.randn(2, tokens, h, dim, device=device, dtype=torch.bfloat16).transpose(1, 2) for h in (8, 2, 2)
    ]  # fmt: skip
    logits, first = torch.randn(8, device=device), None
    for _ in range(20):
        leaves = [x.detach().requires_grad_() for x in (*inputs, logits)]
        windowed = longattn.window_attention(*leaves[:3], 200, sink_tokens=4, sink_logits=leaves[3], softcap=20.0)
        grouped = longattn.group_attention(*leaves[:3], 128, shift=64, sink_logits=leaves[3])
        results = windowed, grouped, *torch.autograd.grad((windowed, grouped), leaves, (windowed, grouped))
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
