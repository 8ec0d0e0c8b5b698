"""Which path serves a call: which, force, choose, and a compiled module that does not load."""

import doctest
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import longattn
from longattn.ops import dispatch

COMPILED = longattn.build_info()["compiled"]
X, TABLE = torch.zeros(1, 2, 4, 8), torch.zeros(4, 4)


@pytest.mark.skipif(not COMPILED, reason="nothing was compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_names_the_compiled_kernel(dtype):
    x = X.to(dtype)
    choice = longattn.which(longattn.apply_rope, x, x, TABLE, TABLE)
    assert choice.path == "compiled" and "CPU" in choice.reason
    assert longattn.which("apply_rope", x, x, TABLE, sin=TABLE, interleaved=True) == choice


def test_which_gives_the_reason_for_the_pure_path():
    choice = longattn.which(longattn.apply_rope, X.double(), X.double(), TABLE, TABLE)
    assert choice.path == "pure"
    assert choice.reason == "compiled for float32 and bfloat16, not float64" if COMPILED else "nothing was compiled"
    strided = torch.zeros(1, 2, 4, 16)[..., ::2]
    choice = longattn.which(longattn.apply_rope, strided, X, TABLE, TABLE)
    assert choice.path == "pure"
    assert "not contiguous" in choice.reason if COMPILED else "nothing was compiled" in choice.reason


def test_which_checks_its_arguments():
    with pytest.raises(ValueError, match="which: op must be one of apply_rope, .* got len"):
        longattn.which(len, X)
    with pytest.raises(ValueError, match="apply_rope: key must be"):
        longattn.which(longattn.apply_rope, X, X[:, :, 1:], TABLE, TABLE)


def test_force_holds_inside_its_block_only():
    before = longattn.which(longattn.apply_rope, X, X, TABLE, TABLE)
    with longattn.force("pure"):
        assert longattn.which(longattn.apply_rope, X, X, TABLE, TABLE) == dispatch.Which("pure", "forced")
    assert longattn.which(longattn.apply_rope, X, X, TABLE, TABLE) == before
    with pytest.raises(ValueError, match="force: path must be 'pure' or 'compiled', got 'fast'"):
        with longattn.force("fast"):
            pass


def test_force_holds_on_its_thread_only():
    seen = []
    with longattn.force("pure"):
        thread = threading.Thread(
            target=lambda: seen.append(longattn.which(longattn.apply_rope, X, X, TABLE, TABLE).reason)
        )
        thread.start()
        thread.join()
    assert seen and seen != ["forced"]


def test_forced_compiled_path_raises_where_it_cannot_serve():
    x = X.double()
    with longattn.force("compiled"), pytest.raises(RuntimeError, match="apply_rope: compiled was forced, but"):
        longattn.apply_rope(x, x, TABLE, TABLE)


def test_debug_holds_inside_its_block_only():
    assert not dispatch.debugging()
    with longattn.debug():
        assert dispatch.debugging()
    assert not dispatch.debugging()


@pytest.mark.skipif(not COMPILED, reason="nothing was compiled")
def test_pure_path_for_cuda_tensors_warns_once_a_reason(monkeypatch):
    dispatch._warned.clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        x, table = torch.empty(1, 2, 4, 8, device="cuda"), torch.empty(4, 4, device="cuda")
    with pytest.warns(UserWarning, match="apply_rope: CUDA tensors take the slow .* (no CUDA kernel|not 7.5)"):
        assert not dispatch.choose("apply_rope", x, x, table, table, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch.choose("apply_rope", x, x, table, table, False)


def test_an_old_torch_is_refused_with_the_command_that_mends_it():
    dispatch._require_torch("2.10.0a0+git")
    dispatch._require_torch("3.0")
    with pytest.raises(ImportError, match=r'torch 2.10 or newer, found 2.9.1.* pip install "torch>=2.10"'):
        dispatch._require_torch("2.9.1+cu128")


BROKEN = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import longattn
ours = [str(w.message) for w in caught if "longattn" in str(w.message)]
assert len(ours) == 1 and "do not load" in ours[0] and "--no-build-isolation" in ours[0], ours
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from longattn.ops import dispatch
info = longattn.build_info()
assert not info["compiled"] and info["error"] and info["reason"] is None, info
x, table = torch.randn(1, 2, 4, 8), torch.ones(4, 4)
assert longattn.which("apply_rope", x, x, table, table).path == "pure"
longattn.apply_rope(x, x, table, table)
with FakeTensorMode():
    x, table = torch.empty(1, 2, 4, 8, device="cuda"), torch.empty(4, 4, device="cuda")
try:
    dispatch.choose("apply_rope", x, x, table, table, False)
except RuntimeError as error:
    assert "CUDA tensors are refused" in str(error), error
else:
    raise AssertionError("a CUDA call was not refused")
"""


def test_a_compiled_module_that_does_not_load_warns_and_refuses_cuda(tmp_path):
    source = Path(longattn.__file__).parent
    shutil.copytree(source, tmp_path / "longattn", ignore=shutil.ignore_patterns("*.so", "__pycache__", "demo"))
    (tmp_path / "longattn" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a module")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", BROKEN]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["ops.dispatch", "ops.apply_rope", "info"])
def test_docstring_examples_run(module):
    results = doctest.testmod(importlib.import_module(f"longattn.{module}"))
    assert results.attempted and not results.failed
