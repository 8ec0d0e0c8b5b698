"""The demo's course: extend the shipped model by each plan, reload, score, fine-tune, score, generate."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import longattn
import longattn.hf  # noqa: F401  (checkpoints whose attention was changed ask transformers for it)
from longattn.checkpoint import extend_checkpoint
from longattn.demo import MODEL_FOLDER
from longattn.demo.evaluate import ScoringWindow, encode, perplexity, scoring_windows, token_loss
from longattn.demo.findings import findings
from longattn.demo.finetune import fine_tune, token_stream
from longattn.demo.methods import (
    NEW_TOKENS,
    ROPE_METHODS,
    Change,
    attention_changes,
    everything_change,
    rope_changes,
)
from longattn.demo.results import Continuation, Results, Row, TokenResult
from longattn.demo.text import Document, read_documents

__all__ = ["Settings", "run_demo"]

RESULTS_FILE = "results.json"
EVALUATION_WORK = 10.0  # what one row's scores cost, in fine-tuning steps; for the progress bar only
PROMPT_WITH_TOKENS = (
    "class Point:\n    def __init__(self, x):\n        self.x = x\n\n    def get_x(self):\n        return"
)

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """How much of the demo to run.

    Args:
        methods: rope methods to try, of `methods.ROPE_METHODS`.
        factor: how many times longer the context becomes.
        windows: pieces of held-out text to score.
        tune_steps: optimizer steps of a fine-tune.
        tune_batch: windows of the new length in a step.
        tune_chars: characters of the trained text that the windows are drawn from.
        new_tokens: tokens to generate.
        seed: of the windows drawn.
    """

    methods: Sequence[str] = field(default=ROPE_METHODS)
    factor: int = 4
    windows: int = 32
    tune_steps: int = 40
    tune_batch: int = 4
    tune_chars: int = 2_000_000
    new_tokens: int = 96
    seed: int = 0

    def work(self) -> float:
        """What `run_demo` will report to its `progress`, in all."""
        changes = [*rope_changes(self.methods, 1, self.factor), *attention_changes(2, self.factor)]
        changes.append(everything_change(2, self.factor))
        return sum(EVALUATION_WORK + change.tuned * (self.tune_steps + EVALUATION_WORK) for change in changes)


def run_demo(out: Path, settings: Settings, progress: Progress = lambda doing, work: None) -> Results:
    """Run the demo, and write its checkpoints to `out`/checkpoints and its numbers to `out`/results.json.

    Args:
        out: a new or empty folder, or one that an earlier run wrote.
        settings: how much to run.
        progress: called with what was done and how much work that was, of `settings.work()` in all.

    Raises:
        ValueError: `out` holds other things, or there is no text to read.
    """
    started = time.perf_counter()
    checkpoints = _prepare(out)
    shutil.copytree(MODEL_FOLDER, checkpoints / "original")
    return _Run(checkpoints, settings, progress).results(out, started)


class _Run:
    """One run: the texts as the shipped tokenizer reads them, and the steps that all plans share."""

    def __init__(self, checkpoints: Path, settings: Settings, progress: Progress) -> None:
        self.checkpoints, self.settings, self.progress = checkpoints, settings, progress
        self.model, self.tokenizer = _load(checkpoints / "original")
        self.length = self.model.config.max_position_embeddings
        self.longer = self.length * settings.factor
        self.contexts = [self.length, 2 * self.length, self.longer, 2 * self.longer]
        self.scored = read_documents(scored=True, min_chars=2 * self.contexts[-1])
        self.trained = read_documents(scored=False)
        self.windows = self._windows(self.tokenizer)
        self.stream = self._stream(self.tokenizer, self.trained)

    def results(self, out: Path, started: float) -> Results:
        """All rows, the new tokens, the generated texts; written as JSON."""
        changes = rope_changes(self.settings.methods, self.length, self.settings.factor)
        changes += attention_changes(self.length, self.settings.factor)
        rows = [self._row(change) for change in changes]
        everything, tokens, continuations, report = self._everything()
        results = Results(
            settings=asdict(self.settings),
            versions=_versions(),
            length=self.length,
            contexts=self.contexts,
            num_windows=len(self.windows),
            rows=[*rows, everything],
            tokens=tokens,
            continuations=continuations,
            report=report,
        )
        results.findings = findings(results)
        results.seconds = round(time.perf_counter() - started, 1)
        _write(out, {"complete": True, **results.to_dict()})
        return results

    def _row(self, change: Change) -> Row:
        model, _, _ = self._extended(change)
        return self._measure(change, model, self.windows, self.stream)

    def _extended(self, change: Change) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
        """The checkpoint that the plan makes of the original, written and read back, as a user's would be."""
        source, target = self.checkpoints / "original", self.checkpoints / change.folder
        if change.plan is None:
            return *_load(source), ""
        report = extend_checkpoint(source, target, change.plan)
        return *_load(target), str(report)

    def _measure(
        self, change: Change, model: PreTrainedModel, windows: list[ScoringWindow], stream: torch.Tensor
    ) -> Row:
        plan = None if change.plan is None else change.plan.to_dict()
        row = Row(change.name, change.table, plan, self._scores(change.name, model, windows))
        if change.tuned:
            row.losses = self._tune(change.name, model, stream)
            row.tuned = self._scores(change.name, model, windows)
        return row

    def _scores(self, name: str, model: PreTrainedModel, windows: list[ScoringWindow]) -> dict[int, float]:
        scores = {}
        for context in self.contexts:
            scores[context] = perplexity(model, windows, context)
            self.progress(f"{name}: scored with {context} tokens", EVALUATION_WORK / len(self.contexts))
        return scores

    def _tune(self, name: str, model: PreTrainedModel, stream: torch.Tensor) -> list[float]:
        return fine_tune(
            model,
            stream,
            context=self.longer,
            steps=self.settings.tune_steps,
            batch=self.settings.tune_batch,
            seed=self.settings.seed,
            on_step=lambda: self.progress(f"{name}: fine-tuning", 1.0),
        )

    def _everything(self) -> tuple[Row, TokenResult, list[Continuation], str]:
        """The plan with all parts, fine-tuned, saved, read back, and generated from."""
        change = everything_change(self.length, self.settings.factor)
        model, tokenizer, report = self._extended(change)
        windows, stream = self._windows(tokenizer), self._stream(tokenizer, self.trained)
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in NEW_TOKENS}
        embedding = model.get_input_embeddings().weight.detach().clone()
        before, places = token_loss(model, windows, self.longer, ids.values())
        row = self._measure(change, model, windows, stream)
        after, _ = token_loss(model, windows, self.longer, ids.values())
        tokens = TokenResult(
            ids=ids,
            encoded={token: (encode(self.tokenizer, token), encode(tokenizer, token)) for token in NEW_TOKENS},
            row_norms={token: embedding[row_id].norm().item() for token, row_id in ids.items()},
            mean_row_norm=embedding[: len(self.tokenizer)].norm(dim=1).mean().item(),
            places=places,
            loss_zero_shot=before,
            loss_tuned=after,
        )
        tuned = self.checkpoints / f"{change.folder}-tuned"
        model.save_pretrained(tuned)
        tokenizer.save_pretrained(tuned)
        return row, tokens, self._continuations(*_load(tuned), windows), report

    def _continuations(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: list[ScoringWindow]
    ) -> list[Continuation]:
        """The same long prompt to the original and the changed model, then a short one that holds the new tokens."""
        room = self.longer - self.settings.new_tokens
        prompts = [
            ("original", self.model, self.tokenizer, self.windows[0].ids[-room:]),
            ("everything-tuned", model, tokenizer, windows[0].ids[-room:]),
            ("everything-tuned", model, tokenizer, encode(tokenizer, PROMPT_WITH_TOKENS)),
        ]
        return [_continue(*prompt, self.settings.new_tokens) for prompt in prompts]

    def _windows(self, tokenizer: PreTrainedTokenizerBase) -> list[ScoringWindow]:
        longest = self.contexts[-1]
        windows = scoring_windows(self.scored, tokenizer, count=self.settings.windows, longest=longest)
        if not windows:
            raise ValueError(f"demo: no held-out file of the standard library is as long as {longest} tokens")
        return windows

    def _stream(self, tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> torch.Tensor:
        return token_stream(documents, tokenizer, max_chars=self.settings.tune_chars)


def _load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def _continue(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new_tokens: int
) -> Continuation:
    ids = torch.tensor([list(prompt)])  # (1, prompt)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    text = tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)
    return Continuation(name, len(prompt), tokenizer.decode(list(prompt[-80:])), text)


def _prepare(out: Path) -> Path:
    """Make `out`, or empty what an earlier run wrote there; anything else in it is left alone by refusing."""
    checkpoints = out / "checkpoints"
    if out.exists():
        if not out.is_dir():
            raise ValueError(f"demo: --out must be a folder, got the file {out}")
        if any(out.iterdir()) and not (out / RESULTS_FILE).is_file():
            raise ValueError(f"demo: --out must be new, empty, or written by an earlier demo, got {out}")
        shutil.rmtree(checkpoints, ignore_errors=True)
    checkpoints.mkdir(parents=True)
    _write(out, {"complete": False})
    return checkpoints


def _write(out: Path, content: dict[str, object]) -> None:
    (out / RESULTS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "longattn": longattn.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
    }
