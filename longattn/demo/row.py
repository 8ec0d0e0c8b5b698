"""One row of the demo: extend the shipped checkpoint by a plan, read it back, score, fine-tune, score, generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import longattn.hf  # noqa: F401  (checkpoints whose attention was changed ask transformers for it)
from longattn.checkpoint import extend_checkpoint
from longattn.demo.finetune import fine_tune, token_stream
from longattn.demo.methods import NEW_TOKENS, Change
from longattn.demo.results import Continuation, Everything, Row, TokenResult
from longattn.demo.text import read_documents
from longattn.evaluate import ScoringWindow, encode, score_last, scoring_windows, token_loss

if TYPE_CHECKING:
    from longattn.demo.run import Settings

__all__ = ["EVALUATION_WORK", "Bench", "Progress"]

EVALUATION_WORK = 10.0  # what one row's scores cost, in fine-tuning steps; for the progress bar only
WINDOW_ENDS = (4096, 8192, 12288)  # characters of a file
PROMPT_WITH_TOKENS = """    def get_name(self):
        return self._name

    def set_name(self, name):
        self"""
PROMPT_SHOWN = 80  # tokens of a prompt's end that are shown with what follows

Progress = Callable[[str, float], None]


class Bench:
    """What all rows share: the shipped checkpoint, and the texts as its tokenizer reads them."""

    def __init__(self, checkpoints: Path, settings: Settings, progress: Progress) -> None:
        self.checkpoints, self.settings, self.progress = checkpoints, settings, progress
        self.model, self.tokenizer = _load(checkpoints / "original")
        self.length = self.model.config.max_position_embeddings
        self.longer = self.length * settings.factor
        self.contexts = [self.length, 2 * self.length, self.longer, 2 * self.longer]
        self.scored = read_documents(scored=True, min_chars=2 * self.contexts[-1])
        self.trained = read_documents(scored=False)
        self.windows = self._windows(self.tokenizer)
        self.stream = self._stream(self.tokenizer)

    def run(self, change: Change) -> Row | Everything:
        """Everything that the demo measures of one change."""
        if change.table == "everything":
            return self._everything(change)
        model, _, _ = self._extended(change)
        return self._measure(change, model, self.windows, self.stream)

    def _extended(self, change: Change) -> tuple[Any, Any, str]:
        """The checkpoint that the plan makes of the original, written and read back, as a user's would be."""
        source, target = self.checkpoints / "original", self.checkpoints / change.folder
        if change.plan is None:
            return *_load(source), ""
        report = extend_checkpoint(source, target, change.plan)
        return *_load(target), str(report)

    def _measure(self, change: Change, model: Any, windows: list[ScoringWindow], stream: torch.Tensor) -> Row:
        plan = None if change.plan is None else change.plan.to_dict()
        row = Row(change.name, change.table, plan, self._scores(change.name, model, windows))
        if change.tuned:
            row.losses = self._tune(change.name, model, stream)
            row.tuned = self._scores(change.name, model, windows)
        return row

    def _scores(self, name: str, model: Any, windows: list[ScoringWindow]) -> dict[int, float]:
        scores = {}
        for context in self.contexts:
            scores[context] = score_last(model, windows, context).byte_perplexity
            self.progress(f"{name}: scored with {context} tokens", EVALUATION_WORK / len(self.contexts))
        return scores

    def _tune(self, name: str, model: Any, stream: torch.Tensor) -> list[float]:
        return fine_tune(
            model,
            stream,
            context=self.longer,
            steps=self.settings.tune_steps,
            batch=self.settings.tune_batch,
            seed=self.settings.seed,
            on_step=lambda: self.progress(f"{name}: fine-tuning", 1.0),
        )

    def _everything(self, change: Change) -> Everything:
        """The plan with all parts, fine-tuned, saved, read back, and generated from."""
        model, tokenizer, report = self._extended(change)
        windows, stream = self._windows(tokenizer), self._stream(tokenizer)
        ids: dict[str, int] = {token: tokenizer.convert_tokens_to_ids(token) for token in NEW_TOKENS}
        embedding = model.get_input_embeddings().weight.detach().clone()  # (rows, hidden)
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
        continuations = self._continuations(*_load(tuned), windows)
        return Everything(row, tokens, continuations, report, len(windows))

    def _continuations(self, model: Any, tokenizer: Any, windows: list[ScoringWindow]) -> list[Continuation]:
        """The same long prompt to the original and the changed model, then a short one that holds the new tokens."""
        room = self.longer - self.settings.new_tokens
        prompts = [
            ("original", self.model, self.tokenizer, self.windows[0].ids[-room:]),
            ("everything-tuned", model, tokenizer, windows[0].ids[-room:]),
            ("everything-tuned", model, tokenizer, encode(tokenizer, PROMPT_WITH_TOKENS)),
        ]
        return [_continue(*prompt, self.settings.new_tokens) for prompt in prompts]

    def _windows(self, tokenizer: Any) -> list[ScoringWindow]:
        longest = self.contexts[-1]
        windows = scoring_windows(
            self.scored, tokenizer, count=self.settings.windows, longest=longest, ends=WINDOW_ENDS
        )
        if not windows:
            raise ValueError(f"demo: no held-out file of the standard library is as long as {longest} tokens")
        return windows

    def _stream(self, tokenizer: Any) -> torch.Tensor:
        return token_stream(self.trained, tokenizer, max_chars=self.settings.tune_chars)


def _load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def _continue(name: str, model: Any, tokenizer: Any, prompt: Sequence[int], new_tokens: int) -> Continuation:
    ids = torch.tensor([list(prompt)])  # (1, prompt)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    text = tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)
    return Continuation(name, len(prompt), tokenizer.decode(list(prompt[-PROMPT_SHOWN:])), text)
