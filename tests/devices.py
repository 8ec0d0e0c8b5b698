"""Tests of CUDA tensors, whose same code runs on CPU tensors where there is no GPU.

A test that takes `device` from DEVICES runs on CPU tensors everywhere, and on CUDA tensors under the marker `cuda`,
which tests/conftest.py skips where torch sees no GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch

import longattn

__all__ = ["DEVICES", "captured", "peak_bytes", "serves", "side_stream"]

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]


def serves(device: str, dtype: torch.dtype) -> None:
    """Assert that the attention of a dtype on a GPU is the compiled one; elsewhere either path may serve."""
    x = torch.zeros(1, 2, 8, 64, dtype=dtype, device=device)
    choice = longattn.which(longattn.window_attention, x, x, x, 4)
    assert device == "cpu" or choice.path == "compiled", choice.reason


def captured(step: Callable[[], None], device: str) -> Callable[[], None]:
    """`step` as a CUDA graph that replays it; on a CPU, itself. It leaves its results in tensors that it keeps."""
    if device == "cpu":
        step()
        return step
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextlib.contextmanager
def side_stream(device: str):
    """Run the block on a stream of its own that is busy at first; what it made may be used behind it."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        yield
    torch.cuda.current_stream().wait_stream(stream)


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Most bytes that torch's allocator held above what it held before; on a CPU, of what torch itself allocates."""
    if device != "cpu":
        step()  # what loads once
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
