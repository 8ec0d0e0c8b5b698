"""What this installation is: versions, what was compiled for what, and why not; `python -m longattn.info` prints it."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Any

import torch

from longattn.ops import dispatch

__all__ = ["build_info"]


def build_info() -> dict[str, Any]:
    """Say what was compiled for what, or why nothing was.

    Returns:
        A dict that JSON can hold: `longattn`, `python`, `torch`, `transformers` (versions, None where absent),
        `compiled` (bool), `reason` (why nothing was compiled, or None), `error` (why the compiled module does not
        load, or None), `built` (facts of the compiled module: torch and compiler it was built with, CPU targets, CUDA
        archs; or None), `no_cuda` (why no CUDA kernels were compiled, or None).

    Example:
        >>> build_info()["compiled"] in (True, False)
        True
    """
    module, error = dispatch.compiled_module(), dispatch.compiled_error()
    built = module.build_info() if module is not None else None
    note = dispatch.build_note()
    return {
        "longattn": _version("longattn"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "compiled": module is not None,
        "reason": None if module is not None or error is not None else note["reason"],
        "error": error,
        "built": built,
        "no_cuda": None if built is not None and built["cuda"] else note["cuda"],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(build_info(), indent=2))
