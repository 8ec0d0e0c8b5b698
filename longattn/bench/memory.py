"""Peak memory of one peer at one case, measured by the operating system in a process of its own.

`python -m longattn.bench.memory SHAPE DTYPE PEER forward|both` prints JSON; `measure` runs it. What counts is growth of
the resident set above the inputs, masks included. glibc gives freed blocks back at once there (its thresholds are set),
so that nothing freed before is used again unseen.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from longattn.bench.cases import Case, parse_case
from longattn.bench.peers import Peer, peers_for
from longattn.bench.text import first_line

__all__ = ["Growth", "measure"]

RELEASE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": "0"}
TIMEOUT_S = 300
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes a unit of ru_maxrss


@dataclass(frozen=True)
class Growth:
    """Peak bytes above the inputs: of a forward, of a backward above what it starts from, and of both together."""

    shape: str
    dtype: str
    peer: str
    output_bytes: int
    grad_bytes: int
    forward: int | None = None
    backward: int | None = None
    both: int | None = None
    trouble: str = ""


def measure(case: Case, peer: Peer, *, backward: bool = True) -> Growth:
    """Measure in a fresh process."""
    works = "both" if backward else "forward"
    command = [sys.executable, "-m", "longattn.bench.memory", case.shape, case.dtype_name, peer.name, works]
    blank = Growth(case.shape, case.dtype_name, peer.name, case.output_bytes, case.grad_bytes)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    try:
        done = subprocess.run(
            command, env={**os.environ, **RELEASE, **threads}, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return replace(blank, trouble=f"not done in {TIMEOUT_S} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        return replace(blank, trouble=lines[-1][:100])
    return replace(blank, **json.loads(done.stdout.strip().splitlines()[-1]))


def _peak() -> int:
    """Bytes. On Linux not ru_maxrss: a child inherits its parent's, and a large parent would hide all growth."""
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def _start() -> int:
    """Bytes resident now. Linux forgets the peak so far; elsewhere the peak so far stands in."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    return _peak()


def _steps(case: Case, peer: Peer, backward: bool) -> dict[str, Any]:
    """Forward alone, then forward and backward, each from a clean start and after a run that loads what loads once."""
    small = case if peer.compiled else replace(case, tokens=min(case.tokens, 4 * 64))
    _forward(small, peer)()
    found: dict[str, Any] = {}
    run = _forward(case, peer)
    start = _start()
    run()
    found["forward"] = _peak() - start
    del run
    if not backward:
        return found
    try:
        _backward(replace(case, tokens=small.tokens), peer)
        found["backward"], found["both"] = _backward(case, peer)
    except Exception as error:
        found["trouble"] = f"backward: {first_line(error)}"
    return found


def _backward(case: Case, peer: Peer) -> tuple[int, int]:
    """Growth during the backward alone, and over forward and backward."""
    query, key, value, grad = case.inputs()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    start = _start()
    out = peer.prepare(case)(*leaves)
    after, before = _peak(), _start()
    torch.autograd.grad(out, leaves, grad)
    return _peak() - before, max(after, _peak()) - start


def _forward(case: Case, peer: Peer) -> Callable[[], object]:
    inputs = case.inputs()[:3]

    def run() -> object:
        with torch.no_grad():
            return peer.prepare(case)(*inputs)

    return run


def _main(shape: str, dtype: str, name: str, works: str) -> None:
    case = parse_case(shape, dtype)
    (peer,) = [peer for peer in peers_for(case.pattern, [name]) if peer.name == name]
    try:
        found = _steps(case, peer, works == "both")
    except Exception as error:
        found = {"trouble": first_line(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
