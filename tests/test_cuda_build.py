"""A build with the CUDA kernels, on machines without a GPU too: its facts, schemas, fakes and what its ops refuse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import longattn

BUILT = (longattn.build_info()["built"] or {}).get("cuda")
pytestmark = pytest.mark.skipif(not BUILT, reason=f"built without CUDA kernels: {longattn.build_info()['no_cuda']}")
PRIVATE = ["_window_fwd", "_window_bwd", "_group_fwd", "_group_bwd", "_rope_fwd", "_rope_positions_fwd"]
PUBLIC = ["window_attention", "group_attention", "apply_rope", "apply_rope_positions"]
ROOT = Path(__file__).parents[1]


def test_build_info_names_the_architectures_of_setup():
    archs = re.findall(r'"arch=\w+,code=(\w+)"', (ROOT / "setup.py").read_text())
    assert BUILT.split() == archs and {"sm_80", "sm_90a", "compute_80"} <= set(archs)
    assert longattn.build_info()["no_cuda"] is None


def test_doctor_shows_the_cuda_build(tmp_path):
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    command = [sys.executable, "-m", "longattn", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["facts"]["built"]["cuda"] == BUILT
    cuda = [row for row in report["paths"] if row["device"] == "cuda"]
    assert {row["op"] for row in cuda} == set(PUBLIC)
    if not torch.cuda.is_available():
        assert all(row["path"] == "none" and "no CUDA device" in row["reason"] for row in cuda)


@pytest.mark.parametrize("op", PRIVATE)
def test_each_private_op_has_a_cuda_kernel(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"longattn::{op}", "CUDA")
    schema = getattr(torch.ops.longattn, op).default._schema
    assert not schema.returns and all(not argument.has_default_value() for argument in schema.arguments)
    written = [argument.name for argument in schema.arguments if argument.alias_info is not None]
    outputs = {"fwd": ["out", "lse"], "bwd": ["grad_query", "grad_key", "grad_value", "grad_sink_logits"]}
    expected = ["query_out", "key_out"] if "rope" in op else outputs[op[-3:]]
    assert written == expected


@pytest.mark.parametrize("op", PUBLIC)
def test_public_ops_have_cuda_kernels(op):
    for name in (op, f"{op}_bwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"longattn::{name}", "CUDA")


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fake_cuda_tensors_go_through_forward_and_backward(dtype, token_major):
    """By the ops themselves: autograd on CUDA tensors needs a device."""
    with FakeTensorMode(), torch.no_grad():
        if token_major:
            query = torch.empty(2, 70, 8, 64, device="cuda", dtype=dtype).transpose(1, 2)
        else:
            query = torch.empty(2, 8, 70, 64, device="cuda", dtype=dtype)
        key = torch.empty(2, 2, 90, 64, device="cuda", dtype=dtype)
        logits, start = torch.empty(8, device="cuda"), torch.empty(2, device="cuda", dtype=torch.int32)
        rest = (0.125, 0.0, 4, logits, None, start, None, 20, 0)
        for op, band in (("window_attention", (15, 0)), ("group_attention", (16, [0] * 4 + [8] * 4, True))):
            out, lse = getattr(torch.ops.longattn, op)(query, key, key, *band, *rest)
            assert (out.device.type, out.dtype, out.shape, out.stride()) == ("cuda", dtype, query.shape, query.stride())
            assert (lse.device.type, lse.dtype, lse.shape) == ("cuda", torch.float32, (2, 8, 70))
            backward = getattr(torch.ops.longattn, f"{op}_bwd")
            grads = backward(out, None, query, key, key, out, lse, *band, *rest)
            for grad, x in zip(grads, (query, key, key, logits), strict=True):
                assert (grad.device.type, grad.dtype, grad.shape) == ("cuda", x.dtype, x.shape)
                assert grad.stride() == x.stride()
        table = torch.empty(70, 32, device="cuda")
        turned, _ = longattn.apply_rope(query, query, table, table)
        assert (turned.device.type, turned.stride()) == ("cuda", query.stride())


def test_a_fake_cuda_call_is_checked_like_a_real_one():
    with FakeTensorMode(), torch.no_grad():
        query, key = (torch.empty(1, 4, tokens, 64, device="cuda", dtype=torch.bfloat16) for tokens in (9, 5))
        with pytest.raises(ValueError, match="must have at least query's 9 tokens"):
            longattn.window_attention(query, key, key, 4)
        with pytest.raises(ValueError, match="device"):
            longattn.window_attention(query, torch.empty(1, 4, 9, 64, dtype=torch.bfloat16), query, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_the_module_needs_no_cuda_library():
    """The CUDA runtime is linked in, so that one binary loads with any torch, with or without CUDA."""
    module = sys.modules["longattn._C"].__file__
    needed = subprocess.run(["readelf", "-d", module], capture_output=True, text=True).stdout
    direct = re.findall(r"\(NEEDED\).*\[(.*?)\]", needed)
    assert direct and not [name for name in direct if "cuda" in name]
