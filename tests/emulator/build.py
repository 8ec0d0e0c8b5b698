"""Compiles C++ of csrc/ with g++ for tests that call it through ctypes; changes when the compiler's flags do."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{ROOT / 'tests'}")


def compile_cpp(folder: Path, source: Path, *flags: str, output: str | None = None, csrc: Path = ROOT / "csrc") -> Path:
    """Compile one file of C++ (or CUDA, as C++) into `folder`: the program `output`, or a shared library."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler[0]})")
    binary = folder / (output or f"{source.stem}.so")
    kind = () if output else ("-shared", "-fPIC")
    command = [*compiler, *FLAGS, f"-I{csrc}", *kind, *flags, "-x", "c++", str(source), "-o", str(binary)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr[:4000]}"
    return binary


def load(folder: Path, source: Path, *flags: str, csrc: Path = ROOT / "csrc") -> ctypes.CDLL:
    """Compile a shared library and load it."""
    return ctypes.CDLL(str(compile_cpp(folder, source, *flags, csrc=csrc)))


def plant(folder: Path, file: str, before: str, after: str) -> Path:
    """Copy csrc/ into `folder` with one place of a file changed."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = (csrc / file).read_text()
    assert source.count(before) == 1, f"{file} holds {source.count(before)} places to plant in"
    (csrc / file).write_text(source.replace(before, after))
    return csrc
