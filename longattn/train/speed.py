"""Counts steps and tokens a second in Trainer; changes with the order of Trainer's events."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["TokensPerSecond"]


class TokensPerSecond(TrainerCallback):
    """Measures a Trainer's steps, without the evaluations and checkpoints between them.

    Each entry of the trainer's log gets `tokens_per_second`, of the steps since the entry before. Tokens are those of
    all processes, padding included. A step counts from its first forward to the optimizer's end; a GPU is waited for
    where a measurement ends.

    Args:
        skip: first steps that are not measured: what is compiled or allocated once would count.

    Attributes:
        steps: optimizer steps measured.
        tokens: their tokens.
        seconds: the time that they took.

    Example:
        >>> speed = longattn.train.TokensPerSecond()
        >>> Trainer(model, arguments, train_dataset=rows, callbacks=[speed]).train()
        >>> speed.per_second
    """

    def __init__(self, skip: int = 1) -> None:
        if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
            raise ValueError(f"TokensPerSecond: skip must be an int of at least 0, got {skip!r}")
        self.skip = skip
        self._start_over()

    @property
    def per_second(self) -> float | None:
        """Tokens a second over all measured steps; None where there is none yet."""
        return self.tokens / self.seconds if self.seconds else None

    def _start_over(self) -> None:
        self.steps = self.tokens = self._seen = 0
        self.seconds = 0.0
        self._unmeasured = self.skip
        self._since: float | None = None  # when the running measurement began
        self._logged = (0, 0.0)  # tokens and seconds at the last entry of the log

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _count_tokens(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _count_tokens(args)
        self._start_over()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._since is None:
            self._seen = int(state.num_input_tokens_seen)
            self._since = _now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._unmeasured:
            self._unmeasured -= 1
            self._since = None
            return
        self.steps += 1
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._stop(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        tokens, seconds = self.tokens - self._logged[0], self.seconds - self._logged[1]
        self._logged = (self.tokens, self.seconds)
        if not seconds:
            return
        for entry in (kwargs.get("logs"), state.log_history[-1]):
            if entry is not None:
                entry["tokens_per_second"] = tokens / seconds

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop(state)

    def _stop(self, state: TrainerState) -> None:
        if self._since is None:
            return
        self.seconds += _now() - self._since
        self.tokens += int(state.num_input_tokens_seen) - self._seen
        self._since = None


def _count_tokens(args: TrainingArguments) -> None:
    """Have Trainer count tokens, which it leaves out by default."""
    if args.include_num_input_tokens_seen == "no":
        args.include_num_input_tokens_seen = "all"


def _now() -> float:
    """Seconds, once all that was given to an accelerator is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
