"""The rotary embedding on a GPU against float64: layouts, partial, gradients, in place, strides, streams, equal bits.

Each test runs on CPU tensors too, so that its code is known to work.
"""

from __future__ import annotations

import pytest
import torch
from devices import DEVICES, captured
from test_apply_rope import assert_close, rotated

import longattn

pytestmark = pytest.mark.parametrize("device", DEVICES)
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.float32, torch.bfloat16, torch.float16]}
SHAPES = [  # batch, tokens, query heads, key heads, head dim, pairs that rotate
    (2, 37, 4, 2, 64, 32),
    (1, 300, 32, 4, 128, 64),
    (2, 19, 6, 3, 80, 20),
    (3, 5, 4, 2, 20, 3),
    (1, 1, 1, 1, 2, 1),
    (2, 130, 3, 5, 96, 24),
    (1, 64, 8, 8, 256, 128),
    (1, 9, 2, 2, 64, 0),
]


def inputs(shape, dtype, device, rows=None):
    """query and key as (B, H, S, D) in (B, S, H, D) memory, and angles in float64."""
    batch, tokens, heads, kv_heads, dim, half = shape
    query, key = (torch.randn(batch, tokens, h, dim).to(device, dtype).transpose(1, 2) for h in (heads, kv_heads))
    angle = 20 * torch.randn(*(() if rows is None else (rows,)), tokens, half, dtype=torch.float64)
    return query, key, angle


def tables(angle, device):
    return angle.cos().float().to(device), angle.sin().float().to(device)


def is_served(query, key, cos, sin, device):
    choice = longattn.which(longattn.apply_rope, query, key, cos, sin)
    assert device == "cpu" or choice.path == "compiled", choice.reason


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_and_gradient_match_reference(shape, interleaved, device):
    for dtype in DTYPES[device]:
        for rows in (None, 1, shape[0]):
            query, key, angle = inputs(shape, dtype, device, rows)
            cos, sin = tables(angle, device)
            is_served(query, key, cos, sin, device)
            leaves = query.requires_grad_(), key.requires_grad_()
            outs = longattn.apply_rope(*leaves, cos, sin, interleaved=interleaved)
            incoming = [torch.randn(x.shape).to(device, dtype) for x in outs]
            grads = torch.autograd.grad(outs, leaves, incoming)
            for x, out, grad, ahead in zip(leaves, outs, grads, incoming, strict=True):
                assert out.stride() == x.stride() and grad.stride() == x.stride()
                assert_close(out.detach().cpu(), rotated(x.detach().cpu(), angle, interleaved))
                assert_close(grad.cpu(), rotated(ahead.cpu(), -angle, interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 3, 8])
def test_rows_of_any_alignment_match_reference(cut, interleaved, device):
    for dtype in DTYPES[device]:
        query, key, angle = inputs((2, 21, 3, 2, 72, 32), dtype, device)
        cos, sin = tables(angle, device)
        query, key = query[..., cut : cut + 64], key[:, :, :, cut : cut + 64]
        outs = longattn.apply_rope(query, key, cos, sin, interleaved=interleaved)
        for x, out in zip((query, key), outs, strict=True):
            assert_close(out.cpu(), rotated(x.cpu(), angle, interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotating_in_place_gives_the_same_bits(interleaved, device):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("longattn::_rope_fwd", device.upper()):
        pytest.skip("nothing was compiled for this device")
    for shape in SHAPES[:4]:
        for dtype in DTYPES[device]:
            query, key, angle = inputs(shape, dtype, device)
            cos, sin = tables(angle, device)
            expected = longattn.apply_rope(query, key, cos, sin, interleaved=interleaved)
            torch.ops.longattn._rope_fwd(query, key, cos, sin, interleaved, False, query, key)
            assert torch.equal(query, expected[0]) and torch.equal(key, expected[1])


def test_positions_of_ten_million_are_right(device):
    inv_freq, scaling = longattn.rope_frequencies({"rope_type": "default", "rope_theta": 1e4}, 64)
    positions = torch.arange(10_000_000, 10_000_037)
    cos, sin = longattn.rope_cos_sin(positions.to(device), inv_freq.to(device), scaling)
    angle = positions.double()[:, None] * inv_freq
    assert float((cos.cpu().double() - angle.cos()).abs().max()) < 1e-7
    query, key, _ = inputs(SHAPES[0], torch.float32, device)
    for x, out in zip((query, key), longattn.apply_rope(query, key, cos, sin), strict=True):
        assert_close(out.cpu(), rotated(x.cpu(), angle, False))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_phases_formed_in_the_kernel_are_exact(packed, interleaved, device):
    inv_freq, scaling = longattn.rope_frequencies({"rope_type": "default", "rope_theta": 1e4}, 64)
    documents = torch.tensor([0, 9, 9, 30, 37], dtype=torch.int32)
    positions = torch.arange(10_000_000, 10_000_037)
    options = {"cu_seqlens": documents.to(device)} if packed else {}
    counted = torch.cat([torch.arange(n) for n in documents.diff().tolist()]) if packed else positions
    angle = counted.double()[:, None] * inv_freq
    for dtype in DTYPES[device]:
        leaves = [x.requires_grad_() for x in inputs((1, 37, 4, 2, 80, 32), dtype, device)[:2]]
        given = None if packed else positions.to(device)
        args = given, inv_freq.to(device), scaling
        choice = longattn.which(longattn.apply_rope_positions, *leaves, *args, interleaved=interleaved, **options)
        assert device == "cpu" or choice.path == "compiled", choice.reason
        outs = longattn.apply_rope_positions(*leaves, *args, interleaved=interleaved, **options)
        grads = torch.autograd.grad(outs, leaves, outs)
        for x, out, grad in zip(leaves, outs, grads, strict=True):
            assert_close(out.detach().cpu(), rotated(x.detach().cpu(), angle, interleaved))
            assert_close(grad.cpu(), rotated(out.detach().cpu(), -angle, interleaved))


def test_graph_replays_with_other_values_and_the_same_bits(device):
    query, key, angle = inputs(SHAPES[1], torch.bfloat16, device)
    cos, sin = tables(angle, device)
    results = []

    def step():
        results[:] = longattn.apply_rope(query, key, cos, sin)

    replay = captured(step, device)
    for _ in range(3):
        query.copy_(torch.randn(query.shape))
        cos.copy_(torch.randn(cos.shape))
        replay()
        assert all(torch.equal(a, b) for a, b in zip(results, longattn.apply_rope(query, key, cos, sin), strict=True))


def test_offsets_past_32_bits(device):
    tokens, row = (40, 8 * 64) if device == "cpu" else ((1 << 17) + 64, 300 * 64)  # elements from token to token
    memory = torch.zeros(1, tokens, row, device=device, dtype=torch.bfloat16)
    heads = memory.unflatten(-1, (-1, 64)).transpose(1, 2)
    query, key = heads[:, -2:].normal_(), heads[:, -3:-2].normal_()
    angle = torch.randn(tokens, 32, dtype=torch.float64)
    outs = longattn.apply_rope(query, key, *tables(angle, device))
    for x, out in zip((query, key), outs, strict=True):
        assert_close(out[:, :, -40:].cpu(), rotated(x[:, :, -40:].cpu(), angle[-40:], False))
