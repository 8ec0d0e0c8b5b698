"""A build with the CUDA kernels, on machines without a GPU too: its facts, schemas, fakes and what its ops refuse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import longattn

BUILT = (longattn.build_info()["built"] or {}).get("cuda")
pytestmark = pytest.mark.skipif(not BUILT, reason=f"built without CUDA kernels: {longattn.build_info()['no_cuda']}")
PRIVATE = ["_window_fwd", "_window_bwd", "_group_fwd", "_group_bwd", "_rope_fwd"]
ROOT = Path(__file__).parents[1]


def test_build_info_names_the_architectures_of_setup():
    archs = re.findall(r'"arch=\w+,code=(\w+)"', (ROOT / "setup.py").read_text())
    assert BUILT.split() == archs and {"sm_80", "sm_90a", "compute_80"} <= set(archs)
    assert longattn.build_info()["no_cuda"] is None


def test_doctor_shows_the_cuda_build():
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    command = [sys.executable, "-m", "longattn", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["facts"]["built"]["cuda"] == BUILT
    cuda = [row for row in report["paths"] if row["device"] == "cuda"]
    assert {row["op"] for row in cuda} == {"apply_rope", "window_attention", "group_attention"}
    if not torch.cuda.is_available():
        assert all(row["path"] == "none" and "no CUDA device" in row["reason"] for row in cuda)


@pytest.mark.parametrize("op", PRIVATE)
def test_each_private_op_has_a_cuda_kernel_beside_the_cpu_one(op):
    for key in ("CUDA", "CPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"longattn::{op}", key)
    schema = getattr(torch.ops.longattn, op).default._schema
    assert not schema.returns and all(not argument.has_default_value() for argument in schema.arguments)
    written = [argument.name for argument in schema.arguments if argument.alias_info is not None]
    outputs = {"fwd": ["out", "lse"], "bwd": ["grad_query", "grad_key", "grad_value", "grad_sink_logits"]}
    expected = ["query_out", "key_out"] if op == "_rope_fwd" else outputs[op[-3:]]
    assert written == expected


@pytest.mark.parametrize("op", ["window_attention", "group_attention", "apply_rope"])
def test_public_ops_have_cuda_kernels(op):
    for name in (op, f"{op}_bwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"longattn::{name}", "CUDA")


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fake_cuda_tensors_go_through_forward_and_backward(dtype, token_major):
    with FakeTensorMode():
        query = torch.empty(2, 70, 8, 64, device="cuda", dtype=dtype).transpose(1, 2)
        query = (query if token_major else query.contiguous()).detach().requires_grad_()
        key = torch.empty(2, 2, 90, 64, device="cuda", dtype=dtype, requires_grad=True)
        logits = torch.empty(8, device="cuda", requires_grad=True)
        start = torch.empty(2, device="cuda", dtype=torch.int32)
        shared = dict(sink_tokens=4, sink_logits=logits, kv_start=start, return_lse=True)
        for out, lse in (
            longattn.window_attention(query, key, key, 16, **shared),
            longattn.group_attention(query, key, key, 16, shift=8, **shared),
        ):
            assert (out.device.type, out.dtype, out.shape, out.stride()) == ("cuda", dtype, query.shape, query.stride())
            assert (lse.device.type, lse.dtype, lse.shape) == ("cuda", torch.float32, (2, 8, 70))
            grads = torch.autograd.grad((out, lse), (query, key, logits), (out, lse))
            for grad, x in zip(grads, (query, key, logits), strict=True):
                assert (grad.device.type, grad.dtype, grad.shape) == ("cuda", x.dtype, x.shape)
        table = torch.empty(70, 32, device="cuda")
        turned, _ = longattn.apply_rope(query, query, table, table)
        assert (turned.device.type, turned.stride()) == ("cuda", query.stride())


def test_a_fake_cuda_call_is_checked_like_a_real_one():
    with FakeTensorMode():
        query = torch.empty(1, 4, 9, 64, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="must have at least query's 9 tokens"):
            longattn.window_attention(query, query[:, :, :5], query[:, :, :5], 4)
        with pytest.raises(ValueError, match="device"):
            longattn.window_attention(query, query.to("cpu"), query, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_the_module_needs_no_cuda_library():
    """The CUDA runtime is linked in, so that one binary loads with any torch, with or without CUDA."""
    module = Path(sys.modules["longattn._C"].__file__)
    assert module.name == f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    listed = subprocess.run(["ldd", str(module)], capture_output=True, text=True).stdout
    names = [line.split()[0] for line in listed.splitlines() if line.split()]
    assert not [name for name in names if re.match(r"lib(cudart|cuda|c10_cuda|torch_cuda)\b", name) and "=>" not in name]
    needed = subprocess.run(["readelf", "-d", str(module)], capture_output=True, text=True).stdout
    direct = re.findall(r"\(NEEDED\).*\[(.*?)\]", needed)
    assert direct and not [name for name in direct if "cuda" in name]
