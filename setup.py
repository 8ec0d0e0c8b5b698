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
# Machine code for compute capability 8.x and 9.0, and PTX that later cards compile for themselves.
CUDA_ARCHS = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80")


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


def cuda_home() -> str | None:
    """The CUDA toolkit: $CUDA_HOME, or the usual place, or that of the nvcc on PATH."""
    nvcc = shutil.which("nvcc")
    usual = ("/usr/local/cuda", nvcc and str(Path(nvcc).resolve().parents[1]))
    for folder in (os.environ["CUDA_HOME"],) if os.environ.get("CUDA_HOME") else usual:
        if folder and Path(folder, "bin", "nvcc").is_file() and Path(folder, "include", "cuda_runtime.h").is_file():
            return folder
    return None


def why_no_cuda() -> str | None:
    """Why no CUDA kernels are compiled; None where they are."""
    if MODE in ("cpu", "none"):
        return f"LONGATTN_BUILD={MODE}"
    if cuda_home() is None:
        return "no CUDA toolkit (nvcc and cuda_runtime.h)"
    import torch

    if MODE == "auto" and torch.version.cuda is None:  # the kernels include no torch header: "cuda" builds them anyway
        return f"torch {torch.__version__} has no CUDA"
    return None


def add_cuda(extension: dict, home: str) -> None:
    """Add the CUDA kernels; CppExtension, as CUDAExtension refuses a torch without CUDA."""
    extension["sources"] += ["csrc/bindings_cuda.cpp", *sorted(map(str, Path("csrc").glob("*.cu")))]
    extension["include_dirs"].append(str(Path(home, "include")))
    extension["library_dirs"] = [str(Path(home, "lib64"))]
    extension["libraries"] = ["cudart_static", "dl", "rt", "pthread"]
    # Without --no-as-needed the weak symbol of the current stream would be left unresolved.
    extension["extra_link_args"] = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]
    archs = " ".join(arch.rpartition("=")[2] for arch in CUDA_ARCHS)
    extension["extra_compile_args"]["cxx"].append(f'-DLONGATTN_CUDA_ARCHS="{archs}"')
    extension["extra_compile_args"]["nvcc"] = ["-O3", "-std=c++20", *(f"-gencode={arch}" for arch in CUDA_ARCHS)]


def extension() -> dict:
    import torch.utils.cpp_extension as cpp

    try:
        from pybind11 import get_include

        include = [get_include()]  # before torch's older copy
    except ImportError:
        include = []
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, memory_gib // 2))))
    parts = {
        "sources": ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))],
        "depends": sorted(str(header) for kind in ("*.h", "*.cuh") for header in Path("csrc").rglob(kind)),
        "include_dirs": include,
        "extra_compile_args": {"cxx": list(CXX_FLAGS)},
    }
    home = cuda_home()
    if NO_CUDA is None and home:
        cpp.CUDA_HOME = home  # which torch leaves out where it has no CUDA itself
        add_cuda(parts, home)
    compiled = cpp.CppExtension("longattn._C", **parts)
    return {"ext_modules": [compiled], "cmdclass": {"build_ext": cpp.BuildExtension, "build_py": BuildPy}}


class BuildPy(build_py):
    """Leaves a note of what was not built, for `longattn doctor`, and says it once."""

    def run(self) -> None:
        super().run()
        package = Path("longattn") if self.editable_mode else Path(self.build_lib, "longattn")
        package.joinpath("_build.json").write_text(json.dumps({"reason": REASON, "cuda": NO_CUDA}), encoding="utf-8")
        if MODE == "auto" and NO_CUDA:
            missing = f"the compiled kernels: {REASON}" if REASON else f"CUDA kernels: {NO_CUDA}"
            warnings.warn(f"longattn was built without {missing}", stacklevel=1)


if MODE not in ("auto", "cuda", "cpu", "none"):
    raise SystemExit(f"longattn: LONGATTN_BUILD must be auto, cuda, cpu or none, got {MODE!r}")
REASON = "LONGATTN_BUILD=none" if MODE == "none" else why_no_cpu()
NO_CUDA = REASON or why_no_cuda()
if (MODE == "cpu" and REASON) or (MODE == "cuda" and NO_CUDA):
    raise SystemExit(f"longattn: LONGATTN_BUILD={MODE} can't be had: {REASON or NO_CUDA}")
setup(**({"cmdclass": {"build_py": BuildPy}} if REASON else extension()))
