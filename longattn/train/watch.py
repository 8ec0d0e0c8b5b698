"""Callbacks of a run: how far it is, and that its loss stays a number; changes with what a run looks at on its way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerState

__all__ = ["Progress", "StayFinite", "Steps", "Tell"]

# What is being done, steps done, steps in all, and the newest entries of the log.
Progress = Callable[[str, int, int, dict[str, Any]], None]


class StayFinite(TrainerCallback):
    """Ends a run whose loss is no number any more, before that is saved: what is saved is logged first."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        loss = state.log_history[-1].get("loss", 0.0)
        if not math.isfinite(loss):
            raise ValueError(
                f"train: the loss must stay finite, got {loss} at step {state.global_step}; lower learning_rate "
                f"({args.learning_rate:g}) or lengthen warmup ({args.warmup_steps})"
            )


class Steps(TrainerCallback):
    """Logs and saves as often as this run is asked to; Trainer goes on as often as the run before it was."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class Tell(TrainerCallback):
    """Passes on how far training is."""

    def __init__(self, tell: Progress) -> None:
        self.tell = tell
        self.entry: dict[str, Any] = {}

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.entry = {**self.entry, **state.log_history[-1]}
        self.tell("training", state.global_step, state.max_steps, self.entry)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.tell("training", state.global_step, state.max_steps, self.entry)
