"""What a training run writes: its log, the plot of its loss, and the checkpoint; changes with what is kept of a run."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import TrainerCallback

from longattn.checkpoint_source import files_beside_weights, read_json
from longattn.hf.record import layer_patterns
from longattn.info import build_info
from longattn.model_card import CARD, write_training_card
from longattn.part_folder import whole_or_absent
from longattn.report import in_runs
from longattn.train.dtypes import dtype_that_holds
from longattn.train.recipes import merge
from longattn.train.spec import TrainSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LogFile", "loss_plot", "save_adapter", "save_merged"]

# What is kept of Trainer's entries, and what it is called.
KEPT = {
    "step": "step",
    "loss": "loss",
    "eval_loss": "eval_loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "num_input_tokens_seen": "tokens",
    "tokens_per_second": "tokens_per_second",
}
ADAPTER_CONFIG = "adapter_config.json"
SECONDS_BETWEEN = 10.0
PLACES = ("model", "text", "eval_text", "out", "resume")  # what a card leaves out: where things lay
ADAPTER_LOADING = """import longattn  # registers the attention that the model's config names
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(".")  # this folder; the model below it lies where it was trained
"""


class LogFile(TrainerCallback):
    """Writes the whole log anew with each checkpoint, and at entries that are some seconds apart: it grows by the step.

    So a run that is stopped leaves its log.
    """

    def __init__(self, path: Path, spec: TrainSpec, rows: str = "") -> None:
        self.path, self.spec, self.rows = path, spec, rows  # rows: their digest
        self._written = -SECONDS_BETWEEN

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._written >= SECONDS_BETWEEN:
            self.write(state.log_history)
            self._written = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write(state.log_history)

    def check_rows(self) -> None:
        """Refuse other rows than those that the log's run began with: some would come twice and some never.

        Raises:
            ValueError: the text, or what the tokenizer makes of it, has changed.
        """
        began = read_json(self.path).get("rows", self.rows) if self.path.is_file() else self.rows
        if began != self.rows:
            raise ValueError(
                f"train: text must be what it was when the run in {self.spec.out} began, to go on with it, got "
                f"{self.spec.text} with other tokens; name another out"
            )

    def write(self, history: Sequence[dict[str, Any]], complete: bool = False) -> dict[str, Any]:
        """Write the file, whole or not at all, and return what it holds."""
        entries = [{KEPT[key]: value for key, value in entry.items() if key in KEPT} for entry in history]
        entries = [entry for entry in entries if entry.keys() & {"loss", "eval_loss"}]
        versions = {name: build_info()[name] for name in ("longattn", "transformers", "torch", "python")}
        run = {"complete": complete, "run": self.spec.to_dict(), "rows": self.rows}
        log = {**run, "versions": versions, "history": entries}
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)
        return log


def loss_plot(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the loss of training and of held-out text over the steps."""
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held-out, as served", "o--")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.5, markersize=5)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss, nats a token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e4e8ed")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def save_merged(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    spec: TrainSpec,
    out: Path,
    source: Path,
    stored: Any,
    log: dict[str, Any],
) -> tuple[Path, list[str]]:
    """Fold what was trained into the checkpoint, in its dtype where that holds it, beside what else its folder held.

    Returns:
        The folder, and sentences on what is not as before.
    """
    folded: Any = merge(model)
    dtype, notes = dtype_that_holds(folded, stored.dtype)
    folded.to(dtype)
    folded.config.use_cache = stored.use_cache  # Trainer switches it off
    folder = out / "model"
    with whole_or_absent(folder) as part:
        folded.save_pretrained(part)
        tokenizer.save_pretrained(part)
        for path in files_beside_weights(source):
            if not (part / path).exists():
                (part / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / path, part / path)
        _write_card(part, spec, out, stored, log, notes=notes)
    return folder, notes


def save_adapter(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    spec: TrainSpec,
    out: Path,
    source: Path,
    stored: Any,
    log: dict[str, Any],
) -> tuple[Path, list[str]]:
    """Write the adapter by itself, with the tokenizer; it names the checkpoint that it was trained on."""
    folder = out / "adapter"
    with whole_or_absent(folder) as part:
        model.save_pretrained(part)  # type: ignore[operator]
        if spec.plan is None and not Path(spec.model).expanduser().is_dir():
            # by its id, not by where its files lie here; once it is saved, as PEFT would ask the Hub about that id
            config = {**read_json(part / ADAPTER_CONFIG), "base_model_name_or_path": spec.model}
            (part / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(part)
        (part / CARD).unlink(missing_ok=True)  # PEFT's
        if (source / CARD).is_file():
            shutil.copyfile(source / CARD, part / CARD)
        _write_card(part, spec, out, stored, log, loading=ADAPTER_LOADING)
    return folder, []


def _write_card(
    folder: Path,
    spec: TrainSpec,
    out: Path,
    stored: Any,
    log: dict[str, Any],
    *,
    loading: str | None = None,
    notes: Sequence[str] = (),
) -> None:
    settings = {key: value for key, value in spec.to_dict().items() if key not in PLACES}
    base_model = None if Path(spec.model).expanduser().is_dir() else spec.model
    what = [_what(spec, stored, log["history"]), *_measured(log["history"]), *notes]
    write_training_card(folder, what, settings, loading=loading, name=out.name, base_model=base_model)


def _what(spec: TrainSpec, stored: Any, history: Sequence[dict[str, Any]]) -> str:
    # as counted, since the last step of an epoch may have fewer rows
    tokens = max((entry.get("tokens", 0) for entry in history), default=0)
    whole = ["the embeddings"] * spec.train_embeddings + ["the norms"] * spec.train_norms
    learnt = {
        "full": "all weights",
        "new-rows": f"only the embeddings' rows of {len(spec.tokens)} token{'s' * (len(spec.tokens) > 1)}",
        "longlora": ", ".join([f"adapters of rank {spec.rank} on the attention's projections", *whole]),
    }[spec.recipe]
    kept = {"keep": "; it lies here, beside the checkpoint", "merge": "; it is folded into the weights"}[spec.adapter]
    ways = [layer_patterns(stored, part) for part in ("train_attention", "attention")]
    attention = [in_runs([str(pattern) for pattern in patterns]) if patterns else "its own" for patterns in ways]
    return (
        f"{spec.steps:,} steps, {tokens:,} tokens in rows of {spec.length:,}, by transformers' Trainer. "
        f"What learned: {learnt}{'' if spec.recipe == 'full' else kept}. "
        f"Attention while it trained: {attention[0]}; as it is served: {attention[1]}."
    )


def _measured(history: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each loss, its first and last value."""
    found = []
    for key, name in (("loss", "Loss in training"), ("eval_loss", "Loss of held-out text, as served")):
        entries = [entry for entry in history if key in entry]
        if entries:
            first, last = entries[0], entries[-1]
            found.append(f"{name}: {first[key]:.4f} at step {first['step']}, {last[key]:.4f} at step {last['step']}.")
    return [" ".join(found)] if found else []
