"""Trainer over dp x cp ranks: logged losses, the evaluation and the trained weights are those of one process."""

from __future__ import annotations

import distributed_trainer as runs
import pytest
import torch
from transformers import Trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    options = runs.arguments(tmp_path_factory.mktemp("alone"), 4)
    return runs.trained(Trainer(runs.changed(), options, train_dataset=runs.texts()))


@pytest.mark.parametrize("cp", [4, 2])
def test_trainer_over_ranks_is_that_of_one_process(gloo, alone, cp, tmp_path):
    for found in gloo.run(4, runs.on_rank, tmp_path, cp):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert found["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-5)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-10, atol=1e-12)
    assert len(set(alone["losses"])) == runs.STEPS


def test_trainer_without_ranks_for_a_sequence_is_refused(tmp_path):
    assert "must be a ParallelismConfig with cp_size above 1, of 1 ranks in all, got None" in runs.refusal(tmp_path)
