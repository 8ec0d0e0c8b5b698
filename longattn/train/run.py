"""The course of `longattn train`: the plan's checkpoint, rows, recipe, Trainer, in a folder that can be gone on with.

out/train.yaml     what the run was asked for
out/base/          the checkpoint that the plan makes, where there is a plan
out/checkpoints/   Trainer's, the last two
out/log.json, out/loss.png
out/model/         the trained checkpoint, or out/adapter/: whole or absent
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from longattn.checkpoint import extend_checkpoint
from longattn.checkpoint_source import read_config, read_json, source_folder
from longattn.hf.families import family_of
from longattn.plan_yaml import dump_yaml
from longattn.shards import Shards
from longattn.train.dtypes import dtype_of_weights
from longattn.train.outputs import LogFile, loss_plot, save_adapter, save_merged
from longattn.train.packing import PackedDataset, packed_dataset
from longattn.train.recipes import longlora, new_rows
from longattn.train.spec import TrainSpec
from longattn.train.speed import TokensPerSecond
from longattn.train.watch import Progress, StayFinite, Steps, Tell

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TrainResult", "train"]

SPEC, BASE, CHECKPOINTS, LOG, PLOT = "train.yaml", "base", "checkpoints", "log.json", "loss.png"
STATE = "trainer_state.json"  # the last file that Trainer writes of a checkpoint


@dataclass(frozen=True)
class TrainResult:
    """What a run left.

    Args:
        checkpoint: the folder of the trained checkpoint, or of its adapter.
        log: what `log.json` holds.
        notes: sentences on what of the checkpoint is not as before, such as its dtype.
    """

    checkpoint: Path
    log: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def train(spec: TrainSpec, *, progress: Progress | None = None) -> TrainResult:
    """Change a checkpoint by a plan, train it by a recipe with transformers' Trainer, and write what came of it.

    Args:
        spec: the run. Where an earlier process ended before it was done, `resume` goes on from its last whole
            checkpoint, to the same weights, bit for bit on one machine.
        progress: called before each part, after each step and at each entry of the log.

    Returns:
        Where the trained checkpoint is, and the log.

    Raises:
        FileExistsError: `spec.out` holds a run, and `resume` is not set.
        OSError: a file can't be read or written.
        ValueError: the checkpoint, the text or the run in `spec.out` do not go with the spec. A run that fails before
            its first checkpoint leaves nothing behind but a folder that was there before.

    Example:
        >>> longattn.train.train(longattn.train.TrainSpec.from_yaml("train.yaml")).checkpoint
    """
    out, tell = Path(spec.out).expanduser().absolute(), progress or (lambda doing, step, steps, entry: None)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "train: runs in one process, got WORLD_SIZE above 1; over ranks, call Trainer with the recipes"
        )
    was_there = out.is_dir()
    fresh = _begin(spec, out)
    try:
        run = _Run.prepared(spec, out, tell)
        log = run.train()
        tell("writing the checkpoint", spec.steps, spec.steps, {})
        result = run.finish(log)
    except Exception:
        if fresh and not any((out / CHECKPOINTS).glob(f"*/{STATE}")):
            for path in list(out.iterdir()) if was_there else [out]:  # a folder that was there, empty, is the user's
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    return result


def _begin(spec: TrainSpec, out: Path) -> bool:
    """Make the run's folder, or see that the run in it is this one and not done; whether it is new."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"train: out must be a folder, got the file {spec.out}")
    if not out.exists() or not any(out.iterdir()):
        out.mkdir(parents=True, exist_ok=True)
        (out / SPEC).write_text(dump_yaml(spec.to_dict()), encoding="utf-8")
        return True
    if not (out / SPEC).is_file():
        raise ValueError(f"train: out must be new, empty or the folder of an earlier run, got {spec.out}")
    done = [name for name in ("model", "adapter") if (out / name).is_dir()]
    if done:
        raise FileExistsError(f"train: the run in {spec.out} is done, see {Path(spec.out) / done[0]}; name another out")
    if not spec.resume:
        raise FileExistsError(f"train: out {spec.out} holds a run; go on with it by resume (--resume), or name another")
    spec.check_resumes(TrainSpec.from_yaml(out / SPEC))
    return False


@dataclass(frozen=True)
class _Run:
    """A run whose model and rows are there, nothing trained yet."""

    spec: TrainSpec
    out: Path
    source: Path
    trainer: Trainer
    tokenizer: PreTrainedTokenizerBase
    stored: Any  # the config of the checkpoint that is trained, as it is stored
    log_file: LogFile
    rows: PackedDataset

    @classmethod
    def prepared(cls, spec: TrainSpec, out: Path, tell: Progress) -> _Run:
        source = _source(spec, out, tell)
        stored = read_config(source)
        stored.dtype = stored.dtype or dtype_of_weights(source)
        _check_length(spec, stored)
        tokenizer = AutoTokenizer.from_pretrained(source)
        tell("reading the text", 0, spec.steps, {})
        rows = _rows(spec, spec.text, tokenizer)
        held_out = None if spec.eval_text is None else _rows(spec, spec.eval_text, tokenizer)
        tell("loading the model", 0, spec.steps, {})
        model = _with_recipe(spec, source, tokenizer, cast(torch.dtype, stored.dtype))
        log_file = LogFile(out / LOG, spec, rows.digest())
        trainer = Trainer(
            model,
            _arguments(spec, out),
            train_dataset=rows,
            eval_dataset=held_out,
            callbacks=[Steps(), StayFinite(), TokensPerSecond(), log_file, Tell(tell)],
        )
        trainer.remove_callback(PrinterCallback)
        return cls(spec, out, source, trainer, tokenizer, stored, log_file, rows)

    def train(self) -> dict[str, Any]:
        """Train to the last step, from the last whole checkpoint on; returns the log."""
        trainer, spec = self.trainer, self.spec
        last = _last_checkpoint(self.out / CHECKPOINTS)
        if last is not None:
            self.log_file.check_rows()
        state = None if last is None else TrainerState.load_from_json(str(last / STATE))
        if state is not None and state.global_step >= spec.steps:  # Trainer would take one more step
            trainer._load_from_checkpoint(str(last))
            trainer.state = state
        else:
            trainer.args.eval_on_start = spec.eval_text is not None and last is None
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        history = trainer.state.log_history
        if spec.eval_text is not None and not any("eval_loss" in e and e["step"] == spec.steps for e in history):
            trainer.evaluate()
        return self.log_file.write(trainer.state.log_history)

    def finish(self, log: dict[str, Any]) -> TrainResult:
        """Write the plot and, whole or not at all, what was trained; the log is then that of a whole run."""
        loss_plot(log["history"], self.out / PLOT)
        save = save_merged if self.spec.adapter == "merge" else save_adapter
        model = cast(torch.nn.Module, self.trainer.model)
        folder, notes = save(model, self.tokenizer, self.spec, self.out, self.source, self.stored, log)
        return TrainResult(folder, self.log_file.write(self.trainer.state.log_history, complete=True), notes)


def _source(spec: TrainSpec, out: Path, tell: Progress) -> Path:
    """The folder of the checkpoint to train; a plan makes one first, which a run that goes on finds."""
    if spec.plan is None:
        source = source_folder(spec.model).absolute()  # an adapter that is kept names it
        Shards.open(source)  # says what is wrong with them in few words
        return source
    base = out / BASE
    if not base.is_dir():
        tell("extending the checkpoint", 0, spec.steps, {})
        extend_checkpoint(spec.model, base, spec.plan)
    return base


def _check_length(spec: TrainSpec, config: Any) -> None:
    if not hasattr(config, "max_position_embeddings"):
        family_of(config, "train")  # no family that is served lacks it
    rope = getattr(config, "rope_parameters", None) or {}
    types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if spec.length > config.max_position_embeddings and "dynamic" not in types:
        raise ValueError(
            f"train: length must be at most the model's {config.max_position_embeddings} positions, got {spec.length}; "
            "let rope or context extend them"
        )


def _rows(spec: TrainSpec, text: str, tokenizer: PreTrainedTokenizerBase) -> PackedDataset:
    return packed_dataset(text, tokenizer, spec.length, separate=spec.separate_documents, field=spec.field)


def _with_recipe(
    spec: TrainSpec, source: Path, tokenizer: PreTrainedTokenizerBase, stored: torch.dtype
) -> torch.nn.Module:
    """The model with the recipe's weights to train, those in float32."""
    # frozen weights are saved again: bfloat16 must not round them
    frozen = torch.bfloat16 if spec.bf16 and spec.recipe != "full" and stored == torch.bfloat16 else torch.float32
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=frozen)
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in spec.tokens if token not in vocabulary]
    if unknown:
        raise ValueError(f"train: new_tokens must be in the model's tokenizer, got {unknown[0]!r}")
    ids = [vocabulary[token] for token in spec.tokens]
    set_seed(spec.seed)
    if spec.recipe == "full":
        return model
    if spec.recipe == "new-rows":
        adapted = new_rows(model, ids)
    else:
        adapted = longlora(
            model,
            rank=spec.rank,
            alpha=spec.alpha,
            train_embeddings=spec.train_embeddings,
            train_norms=spec.train_norms,
            new_tokens=ids,
        )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _arguments(spec: TrainSpec, out: Path) -> TrainingArguments:
    # left out where it is off: transformers warns of the name, which it has to go by before 6
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if spec.gradient_checkpointing else {}
    arguments = TrainingArguments(
        str(out / CHECKPOINTS),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch,
        per_device_eval_batch_size=spec.batch,
        gradient_accumulation_steps=spec.accumulate,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.schedule,
        warmup_steps=spec.warmup_steps,
        bf16=spec.bf16,
        seed=spec.seed,
        logging_steps=spec.log_every,
        save_steps=spec.save_every,
        save_total_limit=2,
        eval_strategy="no" if spec.eval_every is None else "steps",
        eval_steps=spec.eval_every,
        label_names=["labels"],
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        **checkpointing,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # no DataParallel, which would multiply the batch
    return arguments


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that Trainer finished writing."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{STATE}") if _readable(path)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _readable(state: Path) -> bool:
    try:
        read_json(state)
    except ValueError:  # half of it
        return False
    return True
