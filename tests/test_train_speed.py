"""Tokens a second: what is counted, by a clock that moves as the test says."""

from __future__ import annotations

import pytest
import torch
from hf_models import build, tokens
from transformers import Trainer, TrainingArguments

from longattn.train import TokensPerSecond, speed

SECOND, LENGTH, BATCH, ACCUMULATED = 1.0, 10, 2, 2
STEP_TOKENS = LENGTH * BATCH * ACCUMULATED


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


def train(folder, clock, callback, steps=5, **more):
    """Each forward in training takes a second, each in evaluation a hundred."""
    model = build("llama", torch.float32, num_hidden_layers=1)
    model.register_forward_pre_hook(
        lambda module, args: setattr(clock, "now", clock.now + (SECOND if module.training else 100 * SECOND))
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(24, LENGTH)]
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **{"logging_steps": 1, **more},
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2], callbacks=[callback])
    trainer.train()
    return trainer


def rates(trainer):
    return [entry.get("tokens_per_second") for entry in trainer.state.log_history if "loss" in entry]


def test_first_steps_and_evaluations_are_not_measured(tmp_path, clock):
    counter = TokensPerSecond()
    trainer = train(tmp_path, clock, counter, eval_strategy="steps", eval_steps=2)
    assert (counter.steps, counter.tokens, counter.seconds) == (4, 4 * STEP_TOKENS, 4 * ACCUMULATED * SECOND)
    assert counter.per_second == STEP_TOKENS / ACCUMULATED
    assert rates(trainer) == [None, *[STEP_TOKENS / ACCUMULATED] * 4]
    assert all("tokens_per_second" not in entry for entry in trainer.state.log_history if "eval_loss" in entry)


def test_a_log_entry_speaks_of_the_steps_since_the_one_before(tmp_path, clock):
    counter = TokensPerSecond(skip=0)
    trainer = train(tmp_path, clock, counter, logging_steps=2, eval_strategy="steps", eval_steps=1)
    assert rates(trainer) == [STEP_TOKENS / ACCUMULATED] * 2
    assert counter.tokens == 5 * STEP_TOKENS and counter.steps == 5


def test_nothing_is_known_before_a_step():
    counter = TokensPerSecond()
    assert counter.per_second is None
    with pytest.raises(ValueError, match="TokensPerSecond: skip must be an int of at least 0, got -1"):
        TokensPerSecond(skip=-1)
