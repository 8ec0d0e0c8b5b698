"""setup.py: what LONGATTN_BUILD forces, how it degrades, and what it says; nothing is compiled here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import longattn

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(tmp_path):
    """Run setup.py's build_py on a copy of the sources: (result, the note it left or None)."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "longattn").mkdir()
    (tmp_path / "longattn" / "__init__.py").touch()

    def run(mode, **environment):
        command = [sys.executable, "-W", "always::UserWarning", "setup.py", "-q", "build_py", "--build-lib", "out"]
        variables = {**os.environ, "LONGATTN_BUILD": mode, **environment}
        result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        note = tmp_path / "out" / "longattn" / "_build.json"
        return result, json.loads(note.read_text()) if note.is_file() else None

    return run


@pytest.fixture
def no_torch(tmp_path):
    folder = tmp_path / "no_torch"
    folder.mkdir()
    (folder / "torch.py").write_text("raise ImportError('No module named torch')")
    return {"PYTHONPATH": str(folder)}


def lines_of(result):
    return [line for line in result.stderr.splitlines() if "UserWarning: longattn was built without" in line]


def test_cuda_without_a_toolkit_is_an_error(build):
    result, note = build("cuda", CUDA_HOME="no-such-toolkit")
    assert result.returncode and note is None
    assert "LONGATTN_BUILD=cuda can't be had: no CUDA toolkit" in result.stderr


def test_auto_without_a_toolkit_says_so_in_one_line(build):
    result, note = build("auto", CUDA_HOME="no-such-toolkit")
    assert result.returncode == 0, result.stderr
    assert len(lines_of(result)) == 1 and note == {"reason": None, "cuda": "no CUDA toolkit (nvcc and cuda_runtime.h)"}


def test_an_unknown_mode_is_an_error(build):
    result, _ = build("gpu")
    assert result.returncode and "must be auto, cuda, cpu or none, got 'gpu'" in result.stderr


def test_none_builds_a_pure_package(build, no_torch):
    result, note = build("none", **no_torch)
    assert result.returncode == 0 and note["reason"] == "LONGATTN_BUILD=none"
    assert not lines_of(result)


def test_auto_without_torch_says_so_in_one_line(build, no_torch):
    result, note = build("auto", **no_torch)
    assert result.returncode == 0, result.stderr
    assert len(lines_of(result)) == 1 and "torch is not importable while building" in lines_of(result)[0]
    assert "torch is not importable while building" in note["reason"]


def test_auto_without_a_compiler_says_so_in_one_line(build):
    result, note = build("auto", CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert len(lines_of(result)) == 1 and "no C++ compiler (no-such-compiler)" in lines_of(result)[0]
    assert note["reason"] == "no C++ compiler (no-such-compiler)"


def test_auto_with_a_compiler_that_fails_says_so(build):
    result, note = build("auto", CXX="false")
    assert result.returncode == 0 and note["reason"] == "false does not compile C++20"


def test_cpu_without_a_compiler_is_an_error(build):
    result, note = build("cpu", CXX="no-such-compiler")
    assert result.returncode and note is None
    assert "LONGATTN_BUILD=cpu can't be had: no C++ compiler (no-such-compiler)" in result.stderr


def test_build_info_says_what_was_compiled_or_why_not():
    info = longattn.build_info()
    json.dumps(info)
    if info["compiled"]:
        assert info["reason"] is None and info["built"]["compiler"] and info["built"]["torch"]
    else:
        assert info["reason"] or info["error"]
    assert info["no_cuda"] or info["built"]["cuda"]


def test_readme_has_the_two_commands_that_set_all_up():
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python -c")]
    assert [command.rpartition("&& ")[2] for command in commands] == ["longattn demo", "pytest"]
    assert all("--no-build-isolation" in command for command in commands)


def test_linters_have_one_version_everywhere():
    pyproject, hooks = (ROOT / "pyproject.toml").read_text(), (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff", "clang-format"):
        version = pyproject.partition(f'"{tool}==')[2].partition('"')[0]
        assert version and f"rev: v{version}" in hooks
