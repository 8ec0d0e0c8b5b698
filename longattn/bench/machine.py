"""What was measured on: processor or GPU, threads, load, versions, commit, date, and the machine's own ceilings."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from longattn.bench.timing import Clock, interleave, median_ms
from longattn.info import build_info

__all__ = ["ceilings", "gpu_facts", "gpu_state", "load_average", "machine_facts"]

MATRIX = 1024
COPY_BYTES = 64 << 20


def machine_facts() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        **{
            name: fact for name, fact in build_info().items() if name in ("longattn", "python", "torch", "transformers")
        },
    }


def gpu_facts(device: str) -> dict[str, Any]:
    """`machine_facts`, and those of the GPU, its driver and the libraries of the peers.

    `sources` is a digest; `hopper` names what LONGATTN_HOPPER and LONGATTN_HOPPER_BACKWARD ask for of the kernels for
    compute capability 9.0: `hopper`, `hopper-one`, `hopper-two` or nothing.
    """
    facts = {**machine_facts(), "sources": _sources(), "device": _cpu_model(), "driver": None}
    passes = os.environ.get("LONGATTN_HOPPER_BACKWARD")
    asked = os.environ.get("LONGATTN_HOPPER") == "1"
    facts["hopper"] = ("hopper" + f"-{passes}" * (passes in ("one", "two"))) * asked
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "driver": gpu_state(device).get("driver_version"),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    for package in ("triton", "nvidia-cudnn-frontend", "flash-attn-4"):
        facts[package] = _version(package)
    return facts


def gpu_state(device: str) -> dict[str, str]:
    """Clocks, power and temperature of the first GPU as nvidia-smi gives them; empty on a CPU."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    if device == "cpu":
        return {}
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {}
    return dict(zip(fields, (part.strip() for part in line.split(",")), strict=False))


def load_average() -> float | None:
    """Runnable threads over the last minute, this process's included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def ceilings(dtypes: list[torch.dtype], *, rounds: int, clock: Clock) -> dict[str, float]:
    """Rates no op can beat: copied bytes (read and written) and matmul operations a second, in units of 1e9."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    calls = {"copy GB/s": lambda: target.copy_(source)}
    work = {"copy GB/s": 2.0 * COPY_BYTES}
    for dtype in dtypes:
        name = f"matmul {str(dtype).removeprefix('torch.')} GFLOP/s"
        matrix = torch.randn(MATRIX, MATRIX).to(dtype)
        calls[name] = lambda matrix=matrix: matrix @ matrix  # type: ignore[misc]
        work[name] = 2.0 * MATRIX**3
    for call in calls.values():
        call()
    samples = interleave(calls, rounds=rounds, budget_s=2.0)
    return {name: work[name] / (1e6 * median_ms(taken, clock)) for name, taken in samples.items()}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        stripped = {name.strip(): text.strip() for name, text in fields.items()}
        if "model name" in stripped:
            numbers = ", ".join(f"{name} {stripped[name]}" for name in ("cpu family", "model") if name in stripped)
            return f"{stripped['model name']} ({numbers})"
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _sources() -> str:
    """A digest of the package's Python and, beside a source tree, of its C++ and CUDA: which code was measured."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.parent.glob("csrc/**/*.[chu]*")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    """The commit of the source tree this package runs from, with a + where the tree has changes; None elsewhere."""
    tree = Path(__file__).parents[2]
    if not (tree / ".git").exists():
        return None
    git = ["git", "-C", str(tree)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")
