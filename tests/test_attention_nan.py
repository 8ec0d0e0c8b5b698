"""What is no number comes out of attention as none, for all queries that see it, and for no other batch row or head."""

from __future__ import annotations

import math

import pytest
import torch
from reference import dense, visible_mask

import longattn

PATTERNS = {
    "window": ((24, 0), {}, {"window": (24, 0)}),
    "all": ((-1, -1), {}, {"window": (-1, -1)}),
    "sinks": ((24, 0), {"sink_tokens": 3}, {"window": (24, 0), "sinks": 3}),
    "capped": ((24, 0), {"softcap": 5.0}, {"window": (24, 0)}),
    "logits": ((24, 0), {"sink_logits": torch.zeros(4)}, {"window": (24, 0)}),
    "group": (32, {}, {"group": 32}),
}


def attend(pattern, inputs):
    reach, options, _ = PATTERNS[pattern]
    op = longattn.group_attention if pattern == "group" else longattn.window_attention
    return op(*inputs, reach, return_lse=True, **options)


def expected(pattern, inputs):
    _, options, band = PATTERNS[pattern]
    query, key = inputs[:2]
    mask = visible_mask(*query.shape[:3], key.shape[2], **band)
    shared = {name: value for name, value in options.items() if name != "sink_tokens"}
    return dense(*inputs, mask, **shared), mask


def draw(sq, dtype):
    generator = torch.Generator().manual_seed(sq)
    shapes = ((2, 4, sq, 16), (2, 2, 150, 16), (2, 2, 150, 16))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sq", [1, 150])
@pytest.mark.parametrize("where", ["query", "one channel", "key", "keys", "everything"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_logits_that_are_not_numbers_come_out_as_nan(dtype, pattern, sq, where, number):
    inputs = draw(sq, dtype)
    query, key, _ = inputs
    match where:
        case "query":
            query[1, 2, -1] = number
        case "one channel":
            query[1, 2, -1, 3] = number
        case "key":
            key[0, 1, 140] = number
        case "keys":
            key[0, 1, 100:] = number
        case "everything":
            query.fill_(number), key.fill_(number)
    (ref, ref_lse), _ = expected(pattern, inputs)
    out, lse = attend(pattern, inputs)
    lost = ref.isnan().any(-1)  # (B, Hq, Sq)
    assert torch.equal(lost, ref_lse.isnan() | (ref_lse == math.inf)) and (lost.any() or number == math.inf)
    # of infinite logits alone PyTorch's causal call in bfloat16 makes zeros, with an infinite log-sum-exp
    assert (out[lost].isnan().all(-1) | (lse[lost] == math.inf)).all() and not (lse[lost] < math.inf).any()
    # PyTorch's fused call adds masks, which leaves a key's NaN to the queries of a tile that do not see it
    others = ~lost if where in ("query", "one channel", "everything") else ~lost.any(-1, keepdim=True).expand_as(lost)
    assert out[others].isfinite().all() and (lse[others] < math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sq", [1, 150])
def test_values_that_are_not_numbers_reach_all_who_see_them(dtype, pattern, sq):
    inputs = draw(sq, dtype)
    inputs[2][0, 1, 140, 5] = math.nan
    out, _ = attend(pattern, inputs)
    _, mask = expected(pattern, inputs)
    seen = mask[0, 2:, :, 140]  # by the heads of that KV head
    assert seen.any() and out[0, 2:, :, 5][seen].isnan().all()
    assert out[1].isfinite().all() and out[0, :2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sq", [1, 150])
def test_gradients_of_nan_are_nan(dtype, pattern, sq):
    inputs = draw(sq, dtype)
    inputs[0][1, 2, -1] = math.nan
    inputs = [x.requires_grad_() for x in inputs]
    out, _ = attend(pattern, inputs)
    grads = torch.autograd.grad(out.sum(), inputs)
    _, mask = expected(pattern, inputs)
    assert grads[0][1, 2, -1].isnan().all()
    for grad in grads[1:]:
        assert grad[1, 1][mask[1, 2, -1]].isnan().all()
        assert grad[0].isfinite().all()
