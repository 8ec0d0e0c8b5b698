"""Serving past the training length: flat caches, the streaming example, and a trained model without longattn."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from hf_models import build, build_tokenizer, tokens
from stock_process import assert_same_model, run_without_longattn

import longattn
from longattn.checkpoint import extend_checkpoint
from longattn.evaluate import next_token_losses

TOP = Path(__file__).parents[1]
RESULTS = sorted((TOP / "benchmarks" / "results").glob("serving-*.json"))


@pytest.fixture(scope="module")
def serving():
    spec = importlib.util.spec_from_file_location("serving", TOP / "benchmarks" / "serving.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("pattern", [None, "window:60", "window:60+sinks:4"])
def test_measured_losses_are_the_models_and_flat_caches_stay(serving, pattern):
    model = serving.build("trained", pattern)
    ids = tokens(1, 521)
    rows = list(serving.measure(model, ids, [200, 360, 520], decode=8))
    losses = next_token_losses(model, ids)[0]  # of tokens 1 to 520
    for row in rows:
        end = row["length"]
        assert row["loss"] == pytest.approx(float(losses[end - 8 : end].mean()), rel=1e-3)
    held = [row["cache_bytes"] for row in rows]
    token = 2 * 3 * 2 * 32 * 4  # keys and values, layers, heads, channels, bytes
    if pattern is None:
        assert held == [token * row["length"] for row in rows]
    else:
        assert max(held) == min(held) < token * 200


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_kept_results_show_flat_caches(serving, path, tmp_path):
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    for name in ("trained", "wide"):
        for cache in {row["cache"] for row in rows if row["model"] == name}:
            mine = sorted((r["length"], r["cache_bytes"]) for r in rows if (r["model"], r["cache"]) == (name, cache))
            (first, least), (last, most) = mine[0], mine[-1]
            assert most == least * last // first if cache == "full cache" else most < 1.05 * least
    serving.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_streaming_example_writes_past_the_training_length():
    command = [sys.executable, str(TOP / "examples" / "streaming.py"), "--tokens", "330"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held, written = map(int, re.search(r"the cache holds (\d+) of (\d+) tokens$", done.stdout.strip()).groups())
    assert 251 <= held < 300 and written == 330 + len("import argparse\n") - 1


def test_trained_model_is_served_without_longattn(tmp_path):
    """Trained in shifted groups, exported with windows: the same logits in plain transformers."""
    model = build("llama", dtype=torch.float32)
    plan = longattn.Plan(
        rope={"rope_type": "yarn", "factor": 4.0}, attention="window:16", train_attention="group:16+shift"
    )
    longattn.extend(model, None, plan)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    before = model.lm_head.weight.detach().clone()
    for step in range(3):
        ids = tokens(2, 64, seed=step)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.lm_head.weight, before)
    model.save_pretrained(tmp_path / "longattn")
    build_tokenizer().save_pretrained(tmp_path / "longattn")
    extend_checkpoint(tmp_path / "longattn", tmp_path / "stock", None, export="stock")
    run_without_longattn([tmp_path / "stock"], tmp_path)
    assert_same_model(tmp_path / "longattn", tmp_path / "stock")
