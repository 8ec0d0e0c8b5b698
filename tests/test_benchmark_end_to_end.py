"""The benchmark of a whole model: it goes on where it ended, and its implementations agree."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "end_to_end.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("end_to_end", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in dict(WINDOW=16, VOCABULARY=32, LAYERS=1, WIDTH=64, PEERS=("sdpa",)).items():
        monkeypatch.setattr(module, name, value)
    return module


def test_measurements_are_kept_and_gone_on_with(benchmark, monkeypatch, tmp_path, capsys):
    rows = []
    for left in (3, 2, 0):
        most = ["--most", "1"] if left else []
        arguments = ["--tokens", "64", "--dtype", "float32", "--runs", "1", "--out", str(tmp_path), *most]
        monkeypatch.setattr("sys.argv", ["end_to_end.py", *arguments])
        benchmark.main()
        assert f"{left} left" in capsys.readouterr().out
        (path,) = tmp_path.glob("end-to-end-*.json")
        before, rows = rows, json.loads(path.read_text())["rows"]
        assert rows[: len(before)] == before
    assert [row["implementation"] for row in rows] == ["longattn", "sdpa"] * 2
    assert [row["work"] for row in rows] == ["prefill"] * 2 + ["training step"] * 2
    for row in rows:
        assert "trouble" not in row and len(row["seconds"]) == 1 and row["difference"] < 1e-5
        assert ("profile" in row) == (row["implementation"] == "longattn")
    assert "attention" in rows[0]["profile"]
