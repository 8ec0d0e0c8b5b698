"""What a caller expects of a CUDA op beside its results: graphs, streams, devices, compile, autocast, errors.

Each test runs on CPU tensors too, so that its code is known to work.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from devices import DEVICES, captured, serves, side_stream
from reference import check_against_dense, visible_mask

import longattn

everywhere = pytest.mark.parametrize("device", DEVICES)


def tensors(device, batch=2, heads=4, kv_heads=2, sq=130, sk=130, dim=64, dtype=torch.bfloat16):
    shapes = (heads, sq), (kv_heads, sk), (kv_heads, sk)
    made = (torch.randn(batch, tokens, h, dim) for h, tokens in shapes)
    return [x.to(device, dtype).transpose(1, 2) for x in made]


def both_ops(query, key, value, logits=None, **rows):
    """Outputs, log-sum-exps and gradients of both ops, of inputs that require grad."""
    window = longattn.window_attention(
        query, key, value, 40, sink_tokens=3, sink_logits=logits, return_lse=True, **rows
    )  # fmt: skip
    group = longattn.group_attention(query, key, value, 48, shift=24, sink_logits=logits, return_lse=True, **rows)
    leaves = [query, key, value, *([] if logits is None else [logits])]
    return [*window, *group, *torch.autograd.grad((window[0], group[0]), leaves, (window[0], group[0]))]


@everywhere
def test_graphs_replay_with_other_values_in_their_inputs(device):
    serves(device, torch.bfloat16)
    query, key, value = (x.requires_grad_() for x in tensors(device, sq=70))
    logits = torch.randn(4, device=device, requires_grad=True)
    start, end = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in ([0, 0], [130, 130]))
    results = []

    def step():
        results[:] = both_ops(query, key, value, logits, kv_start=start, kv_end=end)

    replay = captured(step, device)
    for starts, ends in (([0, 5], [130, 120]), ([60, 0], [70, 71]), ([0, 130], [130, 80])):
        with torch.no_grad():
            start.copy_(torch.tensor(starts, dtype=torch.int32))
            end.copy_(torch.tensor(ends, dtype=torch.int32))
            query.copy_(torch.randn(query.shape))
        replay()
        expected = both_ops(query, key, value, logits, kv_start=start, kv_end=end)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@everywhere
def test_ops_run_on_the_current_stream(device):
    query, key, value = (x.requires_grad_() for x in tensors(device))
    expected = both_ops(query, key, value)
    with side_stream(device):
        late = [(x * 1.0).detach().requires_grad_() for x in (query, key, value)]  # behind what keeps the stream busy
        results = both_ops(*late)
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


@pytest.mark.parametrize("other", [pytest.param("cpu"), pytest.param("cuda:1", marks=pytest.mark.cuda)])
def test_ops_run_on_the_device_of_their_tensors(other):
    if other != "cpu" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    here = [x.requires_grad_() for x in tensors("cpu" if other == "cpu" else "cuda:0")]
    there = [x.detach().to(other).requires_grad_() for x in here]
    expected, results = both_ops(*here), both_ops(*there)
    cos, sin = torch.randn(2, 130, 32, device=other)
    results += longattn.apply_rope(*there[:2], cos, sin)
    expected += longattn.apply_rope(*here[:2], cos.to(here[0].device), sin.to(here[0].device))
    assert all(x.device == there[0].device for x in results)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(expected, results, strict=True))
    assert other == "cpu" or torch.cuda.current_device() == 0


@everywhere
def test_a_thread_whose_first_call_is_an_op_is_served(device):
    """CUDA gives a thread its context with the first call that needs one, and maps of tensors are made before that."""
    inputs = tensors(device)
    expected = longattn.window_attention(*inputs, 40)
    assert torch.equal(expected, longattn.window_attention(*inputs, 40))  # whose memory the thread can have again
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(longattn.window_attention, *inputs, 40).result()
    assert torch.equal(expected, result)


@everywhere
def test_compile_takes_the_ops_in_a_full_graph(device):
    query, key, value = (x.requires_grad_() for x in tensors(device))
    cos, sin = torch.randn(2, 130, 32, device=device)

    def step(query, key, value):
        turned, moved = longattn.apply_rope(query, key, cos, sin)
        out = longattn.window_attention(turned, moved, value, 40, sink_tokens=3)
        return out + longattn.group_attention(turned, moved, value, 48, shift=24)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    got, expected = compiled(query, key, value), step(query, key, value)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(x, (query, key, value), expected) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


@everywhere
@pytest.mark.parametrize("op", ["window_attention", "group_attention"])
def test_opcheck(op, device):
    query, key, value = (x.requires_grad_() for x in tensors(device, 1, sq=33, sk=40))
    band = (7, 0) if op == "window_attention" else (8, [0, 0, 4, 4], True)
    start = torch.tensor([3], dtype=torch.int32, device=device)
    rest = (0.125, 0.0, 2, torch.zeros(4, device=device, requires_grad=True), None, start, None, 7, 0)
    torch.library.opcheck(getattr(torch.ops.longattn, op).default, (query, key, value, *band, *rest))
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in (query, key, value, *band, *rest)]
    out, lse = getattr(torch.ops.longattn, op).default(*args)
    backward = getattr(torch.ops.longattn, f"{op}_bwd").default
    torch.library.opcheck(backward, (torch.ones_like(out), None, *args[:3], out, lse, *args[3:]))


@everywhere
def test_autocast_casts_query_key_value_alone(device):
    query, key, value = tensors(device, dtype=torch.float32)
    logits = torch.zeros(4, device=device)
    with torch.autocast(device, torch.bfloat16):
        out, lse = longattn.window_attention(query, key, value, 8, sink_logits=logits, return_lse=True)
        turned, _ = longattn.apply_rope(query, key, *torch.ones(2, 130, 32, device=device))
    assert (out.dtype, lse.dtype, turned.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    low = longattn.window_attention(*(x.bfloat16() for x in (query, key, value)), 8, sink_logits=logits)
    assert torch.equal(out, low)


@everywhere
def test_what_the_kernels_do_not_serve_takes_the_pure_path(device):
    query, key, value = tensors(device, dtype=torch.float64)
    mask = visible_mask(2, 4, 130, 130, window=(20, 0))

    def attend(query, key, value, sink_logits):
        x = (each.to(device) for each in (query, key, value))
        return [each.cpu() for each in longattn.window_attention(*x, (20, 0), return_lse=True)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that of CUDA tensors on the slow path
        assert longattn.which(longattn.window_attention, query, key, value, 4).path == "pure"
        check_against_dense(attend, *(x.cpu() for x in (query, key, value)), mask)


BROKEN_DEVICE = """
import sys, torch, longattn
device = sys.argv[1]
query = torch.randn(1, 2, 40, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
table = torch.ones(40, 32, device=device)
out = longattn.window_attention(query, query, query, 8)
runs = {
    "attention forward": lambda: longattn.window_attention(query, query, query, 8),
    "attention backward": lambda: torch.autograd.grad(out, query, out, retain_graph=True),
    "apply_rope": lambda: longattn.apply_rope(query, query, table, table),
}
try:  # an index out of range stops a GPU for good: whatever is launched from here on fails
    torch.zeros(4, device=device)[torch.tensor([9], device=device)].cpu()
except Exception as error:
    print("stopped:", type(error).__name__)
for name, run in runs.items():
    try:
        run()
    except RuntimeError as error:
        print("reported:", name, "|", str(error).splitlines()[0])
    else:
        print("ran:", name)
"""


@everywhere
def test_a_launch_that_fails_is_an_error(device):
    command = [sys.executable, "-c", BROKEN_DEVICE, device]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines and lines[0].startswith("stopped:"), done.stderr
    assert len(lines) == 4
    assert all(line.startswith("ran:" if device == "cpu" else "reported:") for line in lines[1:]), lines


@everywhere
def test_private_ops_refuse_what_would_read_outside(device):
    if torch._C._dispatch_has_kernel_for_dispatch_key("longattn::_window_fwd", device.upper()) is False:
        pytest.skip("nothing was compiled for this device")
    query, key, value = (x.contiguous() for x in tensors(device))
    out, lse = torch.empty_like(query), torch.empty(2, 4, 130, device=device)
    options = (0.125, 0.0, 0, None, None, None, None, 0, 0)
    run = torch.ops.longattn._window_fwd
    with pytest.raises(RuntimeError, match="value must be"):
        run(query, key, value[:, :, :-1], 7, 0, *options, out, lse)
    with pytest.raises(RuntimeError, match="lse must be"):
        run(query, key, value, 7, 0, *options, out, lse[:, :, :-1])
