"""Few queries against many keys on a GPU: static caches, long caches, sinks, one graph for all lengths.

Each test runs on CPU tensors too, on fewer or smaller cases, so that its code is known to work.
"""

from __future__ import annotations

import pytest
import torch
from attention_calls import check_group, check_window
from devices import DEVICES, captured, serves
from reference import assert_close, dense, error, finite, visible_mask

import longattn

pytestmark = pytest.mark.parametrize("device", DEVICES)


def tensors(batch, heads, kv_heads, sq, sk, dim=64, dtype=torch.bfloat16):
    shapes = (heads, sq), (kv_heads, sk), (kv_heads, sk)
    return [torch.randn(batch, tokens, h, dim).to(dtype).transpose(1, 2) for h, tokens in shapes]


def check_results(out, lse, query, key, value, mask, **options):
    """Output and log-sum-exp against the float64 reference."""
    query, key, value, out, lse = (x.cpu() for x in (query, key, value, out, lse))
    exact, low = (dense(query, key, value, mask, dtype=dtype, **options) for dtype in (torch.float64, query.dtype))
    assert_close("out", out, exact[0], error(low[0], exact[0]))
    assert_close("lse", lse, exact[1], error(finite(low[1]), finite(exact[1])), floor=4e-3)


@pytest.mark.parametrize("sq", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (8, 1), (6, 2)])
def test_static_caches_match_reference(heads, kv_heads, sq, device):
    serves(device, torch.bfloat16)
    for sk, dim, window in ((33, 64, (-1, 0)), (300, 128, (-1, 0)), (300, 96, (100, 0)), (1000, 256, (40, 0))):
        if device == "cpu" and (dim > 96 or (sq, heads) not in ((1, 8), (3, 6))):
            continue
        rows = dict(kv_end=torch.tensor([sk, max(sq, sk // 3), sq], dtype=torch.int32))
        rows["kv_start"] = torch.tensor([0, 5, sk], dtype=torch.int32)
        call = *tensors(3, heads, kv_heads, sq, sk, dim), torch.randn(heads), dict(sink_tokens=3, softcap=0.0), rows
        check_window(call, window, use_lse=True, device=device)
        check_group(call, 64, 32, use_lse=True, device=device)


@pytest.mark.parametrize("window", [(-1, 0), (1000, 0)], ids=["full", "W1001"])
@pytest.mark.parametrize("heads, kv_heads, dim", [(32, 4, 128), (8, 8, 64)])
def test_long_caches_match_reference(heads, kv_heads, dim, window, device):
    if device == "cpu" and heads == 32:
        pytest.skip("the other shape shows that the code runs")
    sk = 3000 if device == "cpu" else 1 << 17
    query, key, value = (x.to(device) for x in tensors(1, heads, kv_heads, 1, sk, dim))
    logits = torch.randn(heads, device=device)
    options = dict(sink_tokens=4, sink_logits=logits, return_lse=True)
    out, lse = longattn.window_attention(query, key, value, window, **options)
    mask = visible_mask(1, heads, 1, sk, window=window, sinks=4)
    check_results(out, lse, query, key, value, mask, sink_logits=logits.cpu())


def test_one_graph_serves_every_length_of_a_cache(device):
    serves(device, torch.bfloat16)
    query, key, value = (x.to(device) for x in tensors(2, 4, 2, 1, 256))
    end = torch.tensor([1, 1], dtype=torch.int32, device=device)
    results = []

    def step():
        results[:] = longattn.window_attention(query, key, value, (-1, 0), kv_end=end, return_lse=True)

    replay = captured(step, device)
    for ends in ([1, 2], [17, 40], [256, 255]):
        end.copy_(torch.tensor(ends, dtype=torch.int32))
        replay()
        mask = visible_mask(2, 4, 1, 256, window=(-1, 0), kv_end=torch.tensor(ends))
        check_results(*results, query, key, value, mask)


def test_keys_that_are_not_written_are_not_read(device):
    query, key, value = tensors(2, 4, 2, 2, 300)
    end = torch.tensor([300, 170], dtype=torch.int32)
    key[1, :, 170:], value[1, :, 170:] = float("nan"), float("inf")
    out, lse = longattn.window_attention(
        *(x.to(device) for x in (query, key, value)), (-1, 0), kv_end=end.to(device), return_lse=True
    )
    key, value = key.nan_to_num(0.0), value.nan_to_num(posinf=0.0)
    mask = visible_mask(2, 4, 2, 300, window=(-1, 0), kv_end=end)
    check_results(out, lse, query, key, value, mask)
