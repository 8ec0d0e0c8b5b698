"""FSDP2 on two gloo ranks: losses, gradients, patterns and the saved checkpoint are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsdp_worker import RANKS, batches, step
from training_helpers import TRAINING, each_layer, extended
from transformers import AutoModelForCausalLM

WORKER = Path(__file__).with_name("fsdp_worker.py")


@pytest.fixture(scope="module")
def report(sharded) -> dict:
    return json.loads((sharded / "report.json").read_text())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """The folder that the ranks wrote; they have compared their gradients with those of the whole model."""
    folder = tmp_path_factory.mktemp("fsdp")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*launch, str(WORKER), str(folder)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return folder


def test_sharded_steps_are_those_of_one_process(report):
    steps = report["steps"]
    assert len(steps) == 6
    for name, seen in steps.items():
        assert seen["loss"] == pytest.approx(seen["expected"], rel=1e-5), name
    assert steps["whole, False"]["loss"] != pytest.approx(steps["packed, False"]["loss"], rel=1e-3)


def test_sharded_layers_attend_by_the_training_pattern(report):
    model, *_ = extended()
    for name, seen in report["steps"].items():
        times = 2 if name.endswith("True") else 1
        expected = sorted(each_layer(model, TRAINING, times).elements())
        assert seen["calls"] == [f"{layer}: {pattern}" for layer, pattern in expected], name


def test_full_state_of_shards_is_a_checkpoint(sharded):
    expected, _, new_ids = extended()
    batch = batches(new_ids)["whole"]
    step(expected.train(), batch)
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    loaded = AutoModelForCausalLM.from_pretrained(sharded / "model")
    assert type(loaded) is type(expected) and loaded.config.longattn == expected.config.longattn
    with torch.no_grad():
        got, ref = loaded(batch["input_ids"]).logits, expected.eval()(batch["input_ids"]).logits
    torch.testing.assert_close(got, ref, rtol=1e-3, atol=1e-3)


def test_sharded_models_are_refused(report):
    got = "model must be given before fully_shard, got FSDPLlamaForCausalLM"
    assert report["refusals"] == [f"extend: {got}", f"restore: {got}"]
