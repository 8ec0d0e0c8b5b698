"""Compile the optional module longattn._C. LONGATTN_BUILD=auto|cuda|cpu|none: README, "Install"."""

import json
import os
import shlex
import shutil
import subprocess
import sysconfig
import warnings
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

MODE = os.environ.get("LONGATTN_BUILD", "auto")
TORCH_TARGET = "0x020a000000000000"  # the LibTorch stable ABI of torch 2.10, which all later ones serve
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
NO_CUDA = "this version has no CUDA sources"


def why_no_cpu() -> str | None:
    """What is missing to compile the CPU kernels; None where nothing is."""
    if os.name == "nt":
        return "the kernels are not compiled on Windows"
    try:
        import torch
    except ImportError:
        return "torch is not importable while building; install it first, then: pip install --no-build-isolation ."
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler ({compiler[0]})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return f"no Python headers ({sysconfig.get_path('include')}/Python.h)"
    probe = [*compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-I" + sysconfig.get_path("include"), "-"]
    result = subprocess.run(probe, input="#include <Python.h>\n#include <span>\n", capture_output=True, text=True)
    return f"{shlex.join(compiler)} does not compile C++20" if result.returncode else None


def extension() -> dict:
    import torch.utils.cpp_extension as cpp

    try:
        from pybind11 import get_include

        include = [get_include()]  # before torch's older copy
    except ImportError:
        include = []
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, memory_gib // 2))))
    sources = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    depends = sorted(map(str, Path("csrc").rglob("*.h")))
    compiled = cpp.CppExtension(
        "longattn._C", sources, include_dirs=include, extra_compile_args={"cxx": CXX_FLAGS}, depends=depends
    )
    return {"ext_modules": [compiled], "cmdclass": {"build_ext": cpp.BuildExtension, "build_py": BuildPy}}


class BuildPy(build_py):
    """Leaves a note of what was not built, for `longattn doctor`, and says it once."""

    def run(self) -> None:
        super().run()
        package = Path("longattn") if self.editable_mode else Path(self.build_lib, "longattn")
        package.joinpath("_build.json").write_text(json.dumps({"reason": REASON, "cuda": NO_CUDA}), encoding="utf-8")
        if MODE == "auto":
            missing = f"the compiled kernels: {REASON}" if REASON else f"CUDA kernels: {NO_CUDA}"
            warnings.warn(f"longattn was built without {missing}", stacklevel=1)


if MODE not in ("auto", "cuda", "cpu", "none"):
    raise SystemExit(f"longattn: LONGATTN_BUILD must be auto, cuda, cpu or none, got {MODE!r}")
if MODE == "cuda":
    raise SystemExit(f"longattn: LONGATTN_BUILD=cuda can't be had: {NO_CUDA}")
REASON = "LONGATTN_BUILD=none" if MODE == "none" else why_no_cpu()
if MODE == "cpu" and REASON:
    raise SystemExit(f"longattn: LONGATTN_BUILD=cpu can't be had: {REASON}")
setup(**({"cmdclass": {"build_py": BuildPy}} if REASON else extension()))
