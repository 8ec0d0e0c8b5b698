"""`longattn doctor`: what this installation is and which path serves each op; changes when that report does."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

import longattn
from longattn.ops import dispatch

__all__ = ["doctor"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Path(NamedTuple):
    """Which path serves an op on a device, for one dtype."""

    op: str
    device: str
    dtype: str
    path: str
    reason: str


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, what was compiled, which path serves each op on each device and why, and the model families."""
    facts, paths, families = _facts(), list(_paths()), _families()
    if as_json:
        report = {"facts": facts, "paths": [path._asdict() for path in paths], "families": families}
        typer.echo(json.dumps(report, indent=2))
        return
    console = Console()
    versions = Table("what", "found", title="This installation")
    for name, found in _described(facts).items():
        versions.add_row(name, found)
    served = Table("op", "device", "dtypes", "path", "why", title="What serves each op")
    for (op, device, path, reason), dtypes in _by_path(paths).items():
        served.add_row(op, device, ", ".join(dtypes), path, reason)
    models = Table("families", "windows of their own", "rope", title="Model families that extend serves")
    for (windows, rope), names in _by_kind(families).items():
        models.add_row(", ".join(names), windows, rope)
    console.print(versions, served, models)


def _families() -> list[dict[str, str]]:
    """What is known of each served family; empty where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return []
    from longattn.hf.families import FAMILIES

    windows = {"none": "none", "shared": "one for all layers", "layered": "in the layers of layer_types"}
    rotates = {"all": "", "windowed": ", in the layers with a window", "listed": ", in the layers of no_rope_layers"}
    families = []
    for family in FAMILIES.values():
        rope = ("interleaved" if family.interleaved else "half-split") + rotates[family.rotates]
        rope += f"; rope types {' and '.join(family.rope_types)} alone" if family.rope_types else ""
        families.append({"model_type": family.model_type, "windows": windows[family.windows], "rope": rope})
    return families


def _by_kind(families: list[dict[str, str]]) -> dict[tuple[str, str], list[str]]:
    """Families that share a row: same windows and rope."""
    rows: dict[tuple[str, str], list[str]] = {}
    for family in families:
        rows.setdefault((family["windows"], family["rope"]), []).append(family["model_type"])
    return rows


def _facts() -> dict[str, Any]:
    """What is installed, and what this machine has; keys and values for programs."""
    return {
        **longattn.build_info(),
        "cxx": _version_line(os.environ.get("CXX", "c++")),
        "nvcc": _version_line("nvcc"),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())],
    }


def _described(facts: dict[str, Any]) -> dict[str, str]:
    """The same for people."""
    built: dict[str, Any] = facts["built"] or {}
    if facts["error"]:
        compiled = f"the compiled module does not load: {facts['error']}"
    elif not facts["compiled"]:
        compiled = f"nothing: {facts['reason']}"
    else:
        compiled = f"with {built['compiler']} against torch {built['torch']}"
    return {
        "longattn": facts["longattn"],
        "python": facts["python"],
        "torch": facts["torch"],
        "transformers": facts["transformers"] or "not installed",
        "compiled": compiled,
        "for the CPU": built.get("cpu") or "no",
        "for CUDA": built.get("cuda") or f"no: {facts['no_cuda']}",
        "C++ compiler here": facts["cxx"] or "not found",
        "nvcc here": facts["nvcc"] or "not found",
        "threads": str(facts["threads"]),
        "GPUs": ", ".join(facts["gpus"]) or "none",
    }


def _version_line(command: str) -> str | None:
    """The line of a compiler's --version that has its version; None where there is no such compiler."""
    program = shlex.split(command)
    if not program or shutil.which(program[0]) is None:
        return None
    output = subprocess.run([*program, "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line for line in output if "release" in line), output[0] if output else "no version given")


def _paths() -> Iterator[Path]:
    """The path of a typical call of every op, device and dtype; without a CUDA device, one row an op says so."""
    for op, example in dispatch.registered().items():
        for dtype in DTYPES:
            path, reason = _which(op, example, "cpu", dtype)
            yield Path(op, "cpu", _name(dtype), path, reason)
        if not torch.cuda.is_available():
            yield Path(op, "cuda", "any", "none", "torch sees no CUDA device here")
            continue
        for dtype in DTYPES:
            path, reason = _which(op, example, "cuda", dtype)
            yield Path(op, "cuda", _name(dtype), path, reason)


def _which(op: str, example: Any, device: str, dtype: torch.dtype) -> tuple[str, str]:
    try:
        choice = dispatch.which(op, *example(torch.device(device), dtype))
    except RuntimeError as error:
        return "refused", str(error)
    return choice.path, choice.reason


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_path(paths: list[Path]) -> dict[tuple[str, str, str, str], list[str]]:
    """Dtypes that share a row: same op, device, path and reason."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for row in paths:
        rows.setdefault((row.op, row.device, row.path, row.reason), []).append(row.dtype)
    return rows
