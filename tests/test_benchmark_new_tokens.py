"""The benchmark of new tokens' starts: it measures what it says, and what was kept shows what the page claims."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("new-tokens-*.json"))

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_new_tokens", ROOT / "benchmarks" / "new_tokens.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(benchmark):
    """Two starts of one seed, two steps, few rows."""
    settings = benchmark.Settings(scored_rows=4, batch=2, scored_after=(0, 2), seeds=(0,), train_chars=40_000)
    texts = benchmark.read_texts(settings)
    runs = [benchmark.run_one("new rows", start, 0, settings, texts) for start in ("mean", "descriptions")]
    return settings, texts, runs


def test_text_is_rewritten_with_the_new_tokens_and_nothing_else_changes(benchmark, small):
    _, (trained, scored), _ = small
    for text in (*trained[:3], *scored[:3]):
        assert not any(spelled in text for spelled in benchmark.STANDS_FOR.values())
        assert sum(text.count(token) for token in benchmark.STANDS_FOR) > 20
    original = "def f(self):\n    return self.x\n"
    (text,) = benchmark.rewritten(iter([original]))
    assert text == "<def>f(self):\n<indent><return><self>x\n"
    for token, spelled in benchmark.STANDS_FOR.items():
        text = text.replace(token, spelled)
    assert text == original


def test_scores_are_mean_losses_of_all_and_of_new_tokens(benchmark, small):
    settings, (_, scored), runs = small
    model, tokenizer, ids = benchmark.with_tokens("descriptions")
    rows = benchmark.packed_dataset(scored, tokenizer, benchmark.CONTEXT)
    every, new = [], []
    for at in range(settings.scored_rows):
        row = rows[at]["input_ids"]
        with torch.no_grad():
            log_p = model(row[None]).logits[0, :-1].double().log_softmax(-1)
        losses = (-log_p[torch.arange(len(row) - 1), row[1:]]).tolist()
        every += losses
        new += [loss for loss, token in zip(losses, row[1:].tolist(), strict=True) if token in ids]
    found = runs[1]["scores"][0]
    assert found["places"] == len(new) > 20
    assert found["loss"] == pytest.approx(mean(every), rel=1e-5)
    assert found["new_token_loss"] == pytest.approx(mean(new), rel=1e-5)


def test_a_run_trains_and_is_shown(benchmark, small, tmp_path):
    _, _, runs = small
    assert all(run["scores"][2]["loss"] < run["scores"][0]["loss"] for run in runs)
    lines = benchmark.table(runs).splitlines()
    assert lines[0] == "| learns | start | 0 steps | 2 steps |" and len(lines) == 4
    assert f"| new rows | mean | {runs[0]['scores'][0]['loss']:.3f} | {runs[0]['scores'][2]['loss']:.3f} ± " in lines[2]
    benchmark.plot(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_kept_results_show_what_the_page_claims(benchmark):
    kept = json.loads(RESULTS[-1].read_text())
    runs = [{**run, "scores": {int(step): found for step, found in run["scores"].items()}} for run in kept["runs"]]
    assert len({run["seed"] for run in runs}) >= 3
    page = (ROOT / "docs" / "tokens.md").read_text(encoding="utf-8")
    assert all(line in page for line in benchmark.table(runs).splitlines()[2:])
    for part in benchmark.PARTS:
        by_seed = {(run["start"], run["seed"]): run["scores"] for run in runs if run["learns"] == part}
        for (start, seed), scores in by_seed.items():
            if start in ("subwords", "descriptions"):
                assert all(scores[step]["loss"] < by_seed["mean", seed][step]["loss"] for step in scores), (part, seed)
    assert RESULTS[-1].with_suffix(".png").is_file()
    assert re.search(rf"{RESULTS[-1].stem}\.png", page)
