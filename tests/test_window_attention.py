"""Window attention against the float64 reference: features one by one, the edges, and the errors."""

from __future__ import annotations

import math

import pytest
import torch
from reference import check_against_dense, dense, finite, visible_mask

import longattn


def tensors(batch=1, heads=4, kv_heads=2, sq=33, sk=33, dim=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, sq, dim), (batch, kv_heads, sk, dim), (batch, kv_heads, sk, dim))
    return [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in shapes]


def check(window, q, k, v, *, scale=None, softcap=0.0, sink_tokens=0, sink_logits=None, use_lse=False, **rows):
    left_right = window if isinstance(window, tuple) else (window - 1, 0)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    mask = visible_mask(*shape, window=left_right, sinks=sink_tokens, **rows)

    def attend(query, key, value, logits):
        options = dict(scale=scale, softcap=softcap, sink_tokens=sink_tokens, sink_logits=logits, return_lse=True)
        return longattn.window_attention(query, key, value, window, **options, **rows)

    shared = dict(scale=scale, softcap=softcap, sink_logits=sink_logits, use_lse=use_lse)
    check_against_dense(attend, q, k, v, mask, **shared)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [1, 7, 300, (-1, 0), (-1, -1), (5, 3), (0, 9), (40, -1)])
def test_window_matches_reference(dtype, window):
    check(window, *tensors(sq=129, sk=129, dtype=dtype))


@pytest.mark.parametrize("sq, sk", [(1, 1), (1, 200), (31, 64), (32, 32), (33, 65), (64, 191), (127, 127)])
@pytest.mark.parametrize("window", [8, 32, (33, 0), (-1, 0)])
def test_queries_are_the_last_tokens(sq, sk, window):
    check(window, *tensors(sq=sq, sk=sk), sink_tokens=3)


@pytest.mark.parametrize("dim", [8, 24, 96, 128, 256])
def test_head_dims(dim):
    check(17, *tensors(sq=70, sk=70, dim=dim, dtype=torch.float32))


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 1), (6, 2), (6, 3), (8, 8)])
def test_grouped_query_heads(heads, kv_heads):
    check(20, *tensors(batch=2, heads=heads, kv_heads=kv_heads, sq=90, sk=90), sink_tokens=2)


@pytest.mark.parametrize("sinks", [1, 4, 50, 1000])
@pytest.mark.parametrize("window", [1, 16, 64])
def test_sink_tokens_are_seen_once(sinks, window):
    check(window, *tensors(sq=150, sk=150), sink_tokens=sinks)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("use_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_softcap_and_log_sum_exp_gradients(softcap, use_lse, dtype):
    q, k, v = tensors(sq=80, sk=100, dtype=dtype)
    logits = torch.linspace(-2, 2, q.shape[1])
    check(24, q, k, v, scale=0.7, softcap=softcap, sink_tokens=2, sink_logits=logits, use_lse=use_lse)


@pytest.mark.parametrize("window", [5, 40, (6, 2), (-1, 0)])
def test_left_padding(window):
    start = torch.tensor([0, 7, 39, 50], dtype=torch.int32)
    check(window, *tensors(batch=4, sq=50, sk=50), kv_start=start, sink_tokens=3)


@pytest.mark.parametrize("sq", [1, 6])
def test_static_cache_with_padding(sq):
    start, end = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 0, 9], [40, 17, 2, 9]))
    check(12, *tensors(batch=4, sq=sq, sk=48), kv_start=start, kv_end=end, sink_tokens=2)


@pytest.mark.parametrize("borders", [[0, 60], [0, 0, 13, 13, 60], [0, 1, 2, 59, 60]])
@pytest.mark.parametrize("window", [4, (-1, 0), (3, 3)])
def test_packed_documents(borders, window):
    check(window, *tensors(sq=60, sk=60), cu_seqlens=torch.tensor(borders, dtype=torch.int32), sink_tokens=2)


def test_documents_equal_runs_apart():
    q, k, v = tensors(heads=2, kv_heads=2, sq=40, sk=40)
    packed = longattn.window_attention(
        q, k, v, 6, cu_seqlens=torch.tensor([0, 15, 40], dtype=torch.int32), sink_tokens=2
    )
    parts = [
        longattn.window_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], 6, sink_tokens=2)
        for a, b in ((0, 15), (15, 40))
    ]
    torch.testing.assert_close(packed, torch.cat(parts, 2), rtol=0, atol=0)


def test_rows_that_see_nothing_are_zero():
    q, k, v = (x.requires_grad_() for x in tensors(batch=2, sq=6, sk=6, dtype=torch.float32))
    start = torch.tensor([4, 6], dtype=torch.int32)
    out, lse = longattn.window_attention(q, k, v, (2, 3), kv_start=start, return_lse=True)
    assert torch.equal(out[0, :, :4], torch.zeros_like(out[0, :, :4])) and not out[1].any()
    assert (lse[0, :, :4] == -math.inf).all() and (lse[1] == -math.inf).all() and finite(lse)[0, :, 4:].all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not torch.isnan(grad).any() and not grad[1].any()
    logits = torch.full((4,), 1.5)
    _, lse = longattn.window_attention(q, k, v, 2, kv_start=start, sink_logits=logits, return_lse=True)
    assert torch.equal(lse[1], torch.full_like(lse[1], 1.5))


@pytest.mark.parametrize("batch, heads, sq, sk", [(0, 2, 3, 3), (1, 0, 3, 3), (1, 2, 0, 5), (1, 2, 0, 0)])
def test_empty_sizes(batch, heads, sq, sk):
    q, k, v = (x.requires_grad_() for x in tensors(batch, heads, heads, sq, sk))
    out, lse = longattn.window_attention(q, k, v, 4, sink_tokens=1, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def strided(x, how):
    if how == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "slices of one tensor":
        return torch.cat([x, x], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., : x.shape[-1]]
    if how == "channels apart":
        return torch.stack([x, x], -1)[..., 0]
    return x


@pytest.mark.parametrize("how", ["contiguous", "tokens first", "slices of one tensor", "channels apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_of_inputs_decide_those_of_outputs(how, dtype):
    q, k, v = (strided(x, how) for x in tensors(batch=2, sq=70, sk=70, dtype=dtype))
    out = longattn.window_attention(q, k, v, 9, sink_tokens=1)
    plain = longattn.window_attention(q.contiguous(), k.contiguous(), v.contiguous(), 9, sink_tokens=1)
    torch.testing.assert_close(out, plain, rtol=0, atol=0)
    token_major = how in ("tokens first", "slices of one tensor")
    assert out.transpose(1, 2).is_contiguous() == token_major and out.is_contiguous() != token_major
    check(9, q, k, v, sink_tokens=1)


def test_same_bits_again():
    q, k, v = (x.requires_grad_() for x in tensors(batch=2, sq=300, sk=300, dtype=torch.float32))
    runs = []
    for _ in range(3):
        out = longattn.window_attention(q, k, v, 37, sink_tokens=4)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_window_of_hugging_face_counts_the_query():
    q, k, v = tensors()
    torch.testing.assert_close(
        longattn.window_attention(q, k, v, 5), longattn.window_attention(q, k, v, (4, 0)), rtol=0, atol=0
    )


def test_shard_positions():
    q, k, v = tensors(sq=20, sk=30)
    args = (q, k, v, 6, 0, 0.25, 0.0, 3, None, None, None, None, 37, 25)
    out, lse = torch.ops.longattn.window_attention(*args)
    mask = visible_mask(1, 4, 20, 30, window=(6, 0), sinks=3, query_start=37, key_start=25)
    ref, ref_lse = dense(q, k, v, mask, scale=0.25)
    torch.testing.assert_close(out, ref)
    torch.testing.assert_close(lse, ref_lse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sq", [1, 70])
@pytest.mark.parametrize("scale", [2.0**17, 2.0**30, 2.0**84, -(2.0**84)])
def test_logits_too_large_for_their_differences_to_be_exact(dtype, sq, scale):
    """Products of whole numbers are exact, so that the largest logits stand apart from the others or are equal."""
    inputs = [x.round().requires_grad_() for x in tensors(sq=sq, sk=70, dtype=dtype)]
    out, lse = longattn.window_attention(*inputs, (40, 0), scale=scale, return_lse=True)
    ref, ref_lse = dense(*inputs, visible_mask(1, 4, sq, 70, window=(40, 0)), scale=scale)
    torch.testing.assert_close(out.double(), ref, rtol=0.01, atol=1e-6)
    torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-5, atol=1e-4)  # bfloat16 without a compiled kernel
    *others, grad_value = torch.autograd.grad(out.sum(), inputs)
    assert grad_value.isfinite().all()
    if dtype != torch.float16:  # whose other gradients overflow
        assert not any(gradient.isnan().any() for gradient in others)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [3e9, 3e20, -3e20])
def test_weights_formed_again_from_large_logits_are_at_most_one(dtype, scale):
    """The backward's products may be rounded otherwise than those that the log-sum-exp was formed of."""
    inputs = [x.requires_grad_() for x in tensors(sq=150, sk=150, dim=64, dtype=dtype)]
    if scale > 0 and longattn.which(longattn.window_attention, *inputs, (40, 0)).path == "pure":
        pytest.skip("PyTorch's own fused backward overflows")
    out = longattn.window_attention(*inputs, (40, 0), scale=scale)
    (grad_value,) = torch.autograd.grad(out, inputs[2:], torch.ones_like(out))
    assert grad_value.isfinite().all() and grad_value.max() <= 41 * 2  # queries that see a key, of two heads


ERRORS = [
    (dict(window_size=0), ValueError, "window_attention: window_size must hold at least 1 key, the query's own, got 0"),
    (
        dict(window_size=(-2, 0)),
        ValueError,
        "window_attention: window_size's left bound must be >= 0, or -1 for none, got -2",
    ),
    (dict(window_size=1.5), TypeError, "window_attention: window_size must be an int or a pair of ints, got 1.5"),
    (dict(key=torch.zeros(1, 2, 9, 8)), ValueError, "window_attention: key must have head_dim 16 like query, got 8"),
    (
        dict(key=torch.zeros(1, 3, 9, 16), value=torch.zeros(1, 3, 9, 16)),
        ValueError,
        "multiple of key's 3 heads, got 4",
    ),
    (dict(value=torch.zeros(1, 2, 8, 16)), ValueError, "window_attention: value must have 9 keys like key, got 8"),
    (
        dict(query=torch.zeros(1, 4, 10, 16)),
        ValueError,
        "window_attention: key must have at least query's 10 tokens, got 9",
    ),
    (dict(query=torch.zeros(4, 9, 16)), ValueError, "window_attention: query must be \\(B, H, S, D\\), got shape"),
    (
        dict(key=torch.zeros(1, 2, 9, 16).half()),
        TypeError,
        "key must have query's dtype torch.float32, got torch.float16",
    ),
    (
        dict(query=torch.zeros(1, 4, 9, 16, dtype=torch.int64)),
        TypeError,
        "query must be one of float64, float32, bfloat16",
    ),
    (dict(softcap=-1.0), ValueError, "window_attention: softcap must be >= 0 \\(0 is off\\), got -1.0"),
    (dict(sink_tokens=-1), ValueError, "window_attention: sink_tokens must be an int >= 0, got -1"),
    (dict(sink_logits=torch.zeros(3)), ValueError, "sink_logits must be \\(4,\\), one a query head, got \\(3,\\)"),
    (
        dict(kv_start=torch.zeros(2, dtype=torch.int32)),
        ValueError,
        "window_attention: kv_start must be \\(1,\\), got \\(2,\\)",
    ),
    (dict(kv_start=torch.zeros(1)), TypeError, "window_attention: kv_start must be an int32 tensor, got torch.float32"),
    (
        dict(kv_start=torch.tensor([10], dtype=torch.int32)),
        ValueError,
        "kv_start must lie within 0 .. 9 \\(the keys\\), got",
    ),
    (
        dict(cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)),
        ValueError,
        "cu_seqlens must rise from 0 to the 9 tokens",
    ),
    (
        dict(cu_seqlens=torch.tensor([0, 6, 5, 9], dtype=torch.int32)),
        ValueError,
        "cu_seqlens must rise from 0 to the 9 tokens",
    ),
    (
        dict(cu_seqlens=torch.tensor([0, 9], dtype=torch.int32), kv_start=torch.zeros(1, dtype=torch.int32)),
        ValueError,
        "cu_seqlens can't be given together with kv_start or kv_end",
    ),
]


@pytest.mark.parametrize("change, error, message", ERRORS)
def test_errors_name_op_argument_expected_and_got(change, error, message):
    arguments = dict(
        query=torch.zeros(1, 4, 9, 16), key=torch.zeros(1, 2, 9, 16), value=torch.zeros(1, 2, 9, 16), window_size=4
    )
    with pytest.raises(error, match=message):
        longattn.window_attention(**{**arguments, **change})


def test_double_backward_is_refused():
    q, k, v = (x.requires_grad_() for x in tensors())
    (grad,) = torch.autograd.grad(longattn.window_attention(q, k, v, 4).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="window_attention: double backward is not supported"):
        grad.sum().backward()
