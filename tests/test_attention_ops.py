"""The attention ops as torch ops: opcheck, gradcheck, torch.compile, autocast, dispatch, rows masked on the device."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from reference import check_against_dense, half_shifts, visible_mask
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import longattn
from longattn.ops import pure_backward, pure_forward, scores


def tensors(batch=1, heads=4, kv_heads=2, sq=33, sk=33, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, sq, dim), (batch, kv_heads, sk, dim), (batch, kv_heads, sk, dim))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def sample(op, dtype=torch.float32, token_major=False, **tensor_options):
    q, k, v = tensors(dtype=dtype, **tensor_options)
    if token_major:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    band = (7, 0) if op == "window_attention" else (8, [0, 0, 4, 4], True)
    start = torch.tensor([3], dtype=torch.int32)
    options = (0.25, 0.0, 2, torch.zeros(4), None, start, None, k.shape[2] - q.shape[2], 0)
    return q, k, v, *band, *options


@pytest.mark.parametrize("op", ["window_attention", "group_attention"])
@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(op, token_major, dtype):
    args = sample(op, dtype, token_major, sq=9, sk=12)
    overload = getattr(torch.ops.longattn, op).default
    for x in (*args[:3], args[-6]):
        x.requires_grad_()
    torch.library.opcheck(overload, args)
    out, lse = (x.detach() for x in overload(*args))
    backward = getattr(torch.ops.longattn, f"{op}_bwd").default
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    torch.library.opcheck(backward, (torch.ones_like(out), None, *plain[:3], out, lse, *plain[3:]))
    torch.library.opcheck(backward, (torch.ones_like(out), lse, *plain[:3], out, lse, *plain[3:]))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck(softcap):
    q, k, v = (x.requires_grad_() for x in tensors(heads=2, kv_heads=1, sq=5, sk=7, dim=4, dtype=torch.float64))
    logits = torch.randn(2, dtype=torch.float64, requires_grad=True)
    shared = dict(softcap=softcap, sink_tokens=1, return_lse=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, z: longattn.window_attention(q, k, v, 3, sink_logits=z, **shared), (q, k, v, logits)
    )
    assert torch.autograd.gradcheck(
        lambda q, k, v, z: longattn.group_attention(q, k, v, 4, shift=2, sink_logits=z, **shared), (q, k, v, logits)
    )


def test_compile_fullgraph_without_a_recompile_per_length():
    def step(q, k, v):
        out = longattn.window_attention(q, k, v, 8, sink_tokens=2)
        length = q.shape[2]
        return (out + longattn.group_attention(q, k, v, length // 4, shift=length // 8)).square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    graphs: set[int] = set()
    for length in (16, 24, 40, 64):
        inputs = [x.requires_grad_() for x in tensors(sq=length, sk=length, dim=8)]
        expected = torch.autograd.grad(step(*inputs), inputs)
        got = torch.autograd.grad(compiled(*inputs), inputs)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_compile_with_inductor():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors())
    step = lambda q, k, v: longattn.window_attention(q * 2, k, v, 8).sin().sum()  # noqa: E731
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(q, k, v), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(step(q, k, v), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_casts_query_key_value_alone():
    q, k, v = tensors()
    logits = torch.zeros(4)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = longattn.window_attention(q, k, v, 8, sink_logits=logits, return_lse=True)
        exact = longattn.group_attention(*(x.double() for x in (q, k, v)), 8)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and exact.dtype == torch.float64
    low = longattn.window_attention(*(x.bfloat16() for x in (q, k, v)), 8, sink_logits=logits)
    assert torch.equal(out, low)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = longattn.group_attention(*inputs, 8)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.float().sum(), inputs))


def test_which_and_force():
    q, k, v = tensors()
    choice = longattn.which(longattn.window_attention, q, k, v, 4)
    assert choice.path in ("pure", "compiled") and choice.reason
    with longattn.force("pure"):
        assert longattn.which("group_attention", q, k, v, 4).reason == "forced"
    with pytest.raises(ValueError, match="window_size must hold at least 1 key"):
        longattn.which(longattn.window_attention, q, k, v, 0)


def test_meta_and_fake_tensors():
    q, k, v = (x.to("meta") for x in tensors(sq=5, sk=9))
    out, lse = longattn.window_attention(q, k, v, 4, return_lse=True)
    assert out.shape == q.shape and out.device.type == "meta" and lse.shape == (1, 4, 5)
    with pytest.raises(ValueError, match="must have at least query's 9 tokens"):
        longattn.group_attention(k, q[:, :2], q[:, :2], 4)


@pytest.fixture
def masked_rows(monkeypatch):
    """Treat CPU tensors as a device's, whose values must not be read: rows carry their ends, products are explicit."""
    monkeypatch.setattr(scores, "reads_values", lambda device: False)
    for module in (pure_forward, pure_backward):
        monkeypatch.setattr(module, "is_fused", lambda query, job: False)


def masked_call(op, band, options, q, k, v, sink_logits):
    return op(q, k, v, *band, sink_logits=sink_logits, return_lse=True, **options)


def test_rows_masked_on_the_device_match_reference(masked_rows):
    choose = random.Random(0)
    for seed in range(60):
        batch, heads, kv_heads = choose.choice([(1, 2, 1), (3, 4, 2), (2, 3, 3)])
        sk = choose.choice([1, 9, 40])
        sq = choose.choice([1, sk])
        q, k, v = tensors(batch, heads, kv_heads, sq, sk, 8, torch.float64, seed)
        rows = {}
        kind = choose.choice(["start", "end", "both", "documents", "none"])
        if kind in ("start", "both"):
            rows["kv_start"] = torch.tensor([choose.randint(0, sk) for _ in range(batch)], dtype=torch.int32)
        if kind in ("end", "both"):
            rows["kv_end"] = torch.tensor([choose.randint(0, sk) for _ in range(batch)], dtype=torch.int32)
        if kind == "documents" and sq == sk:
            q, k, v = (x[:1] for x in (q, k, v))
            inner = sorted(choose.randint(0, sk) for _ in range(2))
            rows["cu_seqlens"] = torch.tensor([0, *inner, sk], dtype=torch.int32)
        options = dict(sink_tokens=choose.choice([0, 3]), softcap=choose.choice([0.0, 2.0]))
        shape = (q.shape[0], heads, sq, sk)
        if choose.random() < 0.5:
            window = choose.choice([(5, 0), (-1, 0), (3, 2)])
            op, band = longattn.window_attention, (window,)
            mask = visible_mask(*shape, window=window, sinks=options["sink_tokens"], **rows)
        else:
            options |= dict(shift=choose.choice([0, 3]), causal=choose.random() < 0.5)
            op, band = longattn.group_attention, (6,)
            shared = dict(causal=options["causal"], sinks=options["sink_tokens"], **rows)
            mask = visible_mask(*shape, group=6, shifts=half_shifts(heads, options["shift"]), **shared)
        attend = partial(masked_call, op, band, {**options, **rows})
        check_against_dense(attend, q, k, v, mask, softcap=options["softcap"], use_lse=bool(seed % 2))


TABLE = torch.ones(5, 4, dtype=torch.float64)
CALLS = {
    "window_attention": lambda x: longattn.window_attention(x, x, x, 4),
    "group_attention": lambda x: longattn.group_attention(x, x, x, 4),
    "apply_rope": lambda x: longattn.apply_rope(x, x, TABLE, TABLE)[0],
    "apply_rope_positions": lambda x: longattn.apply_rope_positions(x, x, torch.arange(5), TABLE[0])[0],
}


@pytest.mark.parametrize("op", CALLS)
def test_forward_mode_is_refused_and_not_silently_zero(op):
    x, call = torch.randn(1, 2, 5, 8, dtype=torch.float64), CALLS[op]
    refused = pytest.raises(NotImplementedError, match=f"^{op}: forward-mode differentiation is not supported")
    with refused:
        torch.func.jvp(call, (x,), (x,))
    with forward_ad.dual_level():
        with refused:
            call(forward_ad.make_dual(x, x))
        with refused, torch.no_grad():
            call(forward_ad.make_dual(x.clone().requires_grad_(), x))
        assert torch.equal(call(x), call(x.clone()))  # without a tangent it serves
    with pytest.raises(RuntimeError, match="setup_context"):  # README: torch's own error
        torch.func.grad(lambda x: call(x).sum())(x)
