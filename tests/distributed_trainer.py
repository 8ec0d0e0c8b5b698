"""Trainer on a gloo rank, and in one process, with the same texts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState, PartialState
from hf_models import build, tokens
from torch import Tensor
from transformers import Trainer, TrainingArguments

from longattn.hf.trainer import ContextParallelTrainer
from longattn.plan import Plan
from longattn.surgery import extend

STEPS, ACCUMULATED, LENGTH = 3, 2, 45


def texts() -> list[dict[str, Tensor]]:
    ids = tokens(4 * STEPS * ACCUMULATED, LENGTH)
    return [{"input_ids": row, "labels": torch.where(torch.arange(LENGTH) < 5, -100, row)} for row in ids]


def arguments(folder: Path, rows: int, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=ACCUMULATED,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        prediction_loss_only=True,
        **more,
    )


def trained(trainer: Trainer) -> dict[str, Any]:
    """Losses, the evaluation's loss, and the weights."""
    trainer.train()
    evaluated = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {
        name: p.detach().clone() for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    }
    return {"losses": losses, "evaluated": evaluated, "weights": weights}


def changed() -> Any:
    model = build("llama", initializer_range=0.1)
    extend(model, None, Plan(attention="window:9+sinks:2, group:6+shift, full, window:30"))
    return model


def on_rank(group: dist.ProcessGroup, folder: Path, cp: int) -> dict[str, Any]:
    """What this rank's Trainer finds over dp x cp ranks, all of the world."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    given = dict(zip(names, map(str, (rank, rank, world, world)), strict=True))
    with mock.patch.dict(os.environ, {**given, "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}):
        try:
            config = ParallelismConfig(cp_size=cp, dp_shard_size=world // cp)
            options = arguments(folder / str(rank), 4 * cp // world, parallelism_config=config)
            return trained(ContextParallelTrainer(changed(), options, train_dataset=texts()))
        finally:
            AcceleratorState._reset_state()
            GradientState._reset_state()
            PartialState._reset_state()


def refusal(folder: Path) -> str:
    """What Trainer says where there is nothing to share a sequence."""
    try:
        ContextParallelTrainer(changed(), arguments(folder, 1), train_dataset=texts())
    except ValueError as error:
        return str(error)
    return "nothing"
