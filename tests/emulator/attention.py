"""Runs the CUDA attention kernels in the emulator on torch tensors; mirrors csrc/window_attn.h, field by field."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator.build import ROOT, compile_cpp
from torch import Tensor

INT64, INT32, FLOAT, POINTER = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
MAX_HEADS = 256
FAR = 1 << 60


class View(ctypes.Structure):
    _fields_ = [("data", POINTER), ("batch", INT64), ("head", INT64), ("token", INT64)]


class Rows(ctypes.Structure):
    _fields_ = [
        ("num_queries", INT32), ("num_keys", INT32), ("query_start", INT64), ("key_start", INT64), ("sinks", INT64),
        ("cu_seqlens", POINTER), ("num_documents", INT32), ("kv_start", POINTER), ("kv_end", POINTER),
    ]  # fmt: skip


class Band(ctypes.Structure):
    _fields_ = [("left", INT64), ("right", INT64), ("group", INT64), ("shift", INT64), ("causal", ctypes.c_bool)]


class Params(ctypes.Structure):
    _fields_ = [
        ("query", View), ("key", View), ("value", View), ("out", View), ("lse", POINTER), ("sink_logits", POINTER),
        ("rows", Rows), ("band", Band), ("shifts", INT64 * MAX_HEADS), ("batch", INT32), ("heads", INT32),
        ("kv_heads", INT32), ("head_dim", INT32), ("scale", FLOAT), ("softcap", FLOAT), ("bf16", ctypes.c_bool),
        ("aligned", ctypes.c_bool),
    ]  # fmt: skip


class BackwardParams(ctypes.Structure):
    _fields_ = [
        ("forward", Params), ("grad_out", View), ("grad_query", View), ("grad_key", View), ("grad_value", View),
        ("grad_lse", POINTER), ("grad_sink_logits", POINTER), ("stats", POINTER), ("sink_sums", POINTER),
        ("sink_keys", INT32), ("sink_chunks", INT32), ("query_sums", POINTER), ("query_flags", POINTER),
    ]  # fmt: skip


@dataclass(frozen=True)
class Call:
    """The arguments of one call, as the public ops take them, but for tensors."""

    window: tuple[int, int] | None = None
    group: int = 0
    shifts: Sequence[int] = ()
    causal: bool = True
    scale: float | None = None
    softcap: float = 0.0
    sinks: int = 0
    query_start: int | None = None
    key_start: int = 0


class Emulated:
    """A compiled driver and a folder for its files."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program, self.folder = program, folder
        self.multiprocessors = 8
        self.environment: dict[str, str] = {}
        self.counters: dict[str, int] = {}
        self.output = ""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: Call,
        *,
        sink_logits: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        kv_start: Tensor | None = None,
        kv_end: Tensor | None = None,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of 16-bit query (B, Hq, Sq, D), key and value (B, Hkv, Sk, D) in any strides."""
        out = _like(query)
        lse = torch.full(query.shape[:3], torch.nan)
        params = _params(query, key, value, out, call, cu_seqlens)
        tensors = [query, key, value, out, lse, sink_logits, cu_seqlens, kv_start, kv_end]
        out_bytes, lse_bytes = self._run("forward", params, tensors, [3, 4], seed)
        return _filled(out, out_bytes), _filled(lse, lse_bytes)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> dict[str, int]:
        """How the launcher would split a forward: "splits", and bytes of "scratch"."""
        self._run("plan", _params(query, key, value, query, call, None), [], [], 0)
        return self.counters

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        inputs: tuple[Tensor, Tensor, Tensor],
        saved: tuple[Tensor, Tensor],
        call: Call,
        *,
        sink_logits: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        kv_start: Tensor | None = None,
        kv_end: Tensor | None = None,
        seed: int = 0,
    ) -> list[Tensor]:
        """Gradients of query, key, value and, where there are sink logits, of those; `saved` is (out, lse)."""
        params = _params(*inputs, saved[0], call, cu_seqlens)
        grads = [_like(x) for x in inputs]
        if sink_logits is not None:
            grads.append(torch.full_like(sink_logits, torch.nan))
        strides = [x.stride(i) for x in (grad_out, *grads[:3]) for i in range(3)]
        params.aligned = params.aligned and all(stride % 8 == 0 for stride in strides)
        whole = BackwardParams(
            params, _view(grad_out), *map(_view, grads[:3]), None, None, None, None, 0, 0, None, None
        )
        rows = [sink_logits, cu_seqlens, kv_start, kv_end]
        tensors = [*inputs, *saved, *rows, grad_out, grad_lse, *grads]
        tensors += [None] * (15 - len(tensors))
        parts = self._run("backward", whole, tensors, list(range(11, 11 + len(grads))), seed)
        return [_filled(grad, part) for grad, part in zip(grads, parts, strict=True)]

    def _run(self, which: str, params: Any, tensors: list[Tensor | None], outputs: list[int], seed: int) -> list[bytes]:
        case, result = self.folder / "case", self.folder / "result"
        with case.open("wb") as file:
            file.write(bytes(params))
            for tensor in tensors:
                data = _span(tensor) if tensor is not None else None
                file.write(struct.pack("q", -1 if data is None else len(data)) + (data or b""))
        command = [self.program, which, case, result, str(seed), str(self.multiprocessors)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | self.environment)
        self.output = done.stderr
        assert done.returncode == 0, done.stderr[-3000:]
        self.counters = json.loads(done.stdout)
        assert self.counters["error"] == 0
        raw, at, parts = result.read_bytes(), 0, []
        for i in outputs:
            size = len(_span(tensors[i]))
            parts.append(raw[at : at + size])
            at += size
        return parts


def build_driver(folder: Path, *flags: str, csrc: Path = ROOT / "csrc") -> Emulated:
    """Compile the driver with the kernels of `csrc`; its files lie in `folder`."""
    source = ROOT / "tests" / "emulator" / "attention_driver.cpp"
    return Emulated(compile_cpp(folder, source, "-DLONGATTN_EMULATED", *flags, output="driver", csrc=csrc), folder)


def shared_driver(factory: pytest.TempPathFactory) -> Emulated:
    """The driver with every kernel, compiled once for all files and processes of a test run."""
    base = factory.getbasetemp()
    together = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "driver"
    together.mkdir(exist_ok=True)
    with (together / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (together / "built").exists():
            build_driver(together, "-O2")
            (together / "built").touch()
    return Emulated(together / "driver", factory.mktemp("emulated"))


def _like(x: Tensor) -> Tensor:
    """NaNs of x's shape and order of strides, without gaps."""
    filled = torch.full(x.shape, torch.nan, dtype=x.dtype)
    return filled.transpose(1, 2).contiguous().transpose(1, 2) if x.stride(1) < x.stride(2) else filled


def _span(tensor: Tensor) -> bytes:
    """A tensor's memory from its first to its last element, gaps included."""
    if tensor.numel() == 0:
        return b""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,)).view(torch.uint8).numpy().tobytes()


def _filled(like: Tensor, data: bytes) -> Tensor:
    if not data:
        return like
    flat = torch.frombuffer(bytearray(data), dtype=like.dtype)
    return flat.as_strided(like.shape, like.stride())


def _view(x: Tensor) -> View:
    return View(None, x.stride(0), x.stride(1), x.stride(2))


def _params(query: Tensor, key: Tensor, value: Tensor, out: Tensor, call: Call, cu_seqlens: Tensor | None) -> Params:
    batch, heads, sq, head_dim = query.shape
    documents = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    start = key.shape[2] - sq if call.query_start is None else call.query_start
    rows = Rows(sq, key.shape[2], start, call.key_start, call.sinks, None, documents, None, None)
    if call.window is not None:
        left, right = (FAR if bound < 0 else bound for bound in call.window)
        band = Band(left, right, 0, 0, False)
    else:
        band = Band(0, 0, call.group, 0, call.causal)
    shifts = (INT64 * MAX_HEADS)(*call.shifts)
    scale = head_dim**-0.5 if call.scale is None else call.scale
    strides = [x.stride(i) for x in (query, key, value, out) for i in range(3)]
    aligned = head_dim % 8 == 0 and all(stride % 8 == 0 for stride in strides)
    return Params(
        _view(query), _view(key), _view(value), _view(out), None, None, rows, band, shifts, batch, heads, key.shape[1],
        head_dim, scale, call.softcap, query.dtype == torch.bfloat16, aligned,
    )  # fmt: skip
