"""Callbacks of a run: how far it is, and that its numbers stay finite; changes with what a run looks at on its way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState

__all__ = ["Progress", "StayFinite", "Steps", "Tell"]

# What is being done, steps done, steps in all, and the newest entries of the log.
Progress = Callable[[str, int, int, dict[str, Any]], None]


class StayFinite(TrainerCallback):
    """Ends a run whose loss or weights are no numbers any more, before those are saved: what is saved is logged first.

    A loss is of the weights before its step, so that it tells nothing of those that the last step made.
    """

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        wrong = None
        loss = state.log_history[-1].get("loss", 0.0)
        if not math.isfinite(loss):
            wrong = f"the loss must stay finite, got {loss}"
        elif control.should_save:
            wrong = _not_finite(kwargs["model"])
        if wrong is not None:
            raise ValueError(
                f"train: {wrong} at step {state.global_step}; lower learning_rate ({args.learning_rate:g}) or lengthen "
                f"warmup ({args.warmup_steps})"
            )


def _not_finite(model: nn.Module) -> str | None:
    """What is wrong with the first weights that learn and hold a number that is none; None where all are."""
    for name, weights in model.named_parameters():
        if weights.requires_grad and not (finite := weights.isfinite()).all():
            return f"the weights must stay finite, got {weights[~finite][0].item()} in {name}"
    return None


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
