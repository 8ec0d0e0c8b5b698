"""Retrieval over depth and length: asks a task's questions, decodes greedily, compares exactly."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from longattn.evaluate.losses import forget_lengths, serving
from longattn.evaluate.tasks import SPARE_TOKENS, Question, Task, TooShort
from longattn.wrappers import check_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DEPTHS", "Cell", "evaluate_retrieval", "greedy", "is_answer", "least_length", "questions"]

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Cell:
    """How often one task's answer was found at one length and depth.

    Args:
        task: its name.
        length: tokens of text, question and answer.
        depth: where in the text the answer stands, 0 to 1.
        trials: questions asked.
        correct: of them, answered exactly.
        seed: that they were drawn with.
        wrong: the others: what was asked for, and what the model wrote.
    """

    task: str
    length: int
    depth: float
    trials: int
    correct: int
    seed: int
    wrong: list[tuple[str, str]] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Share of questions answered exactly."""
        return self.correct / self.trials

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Cell:
        """What `to_dict` gave, from JSON too."""
        return cls(**{**stored, "wrong": [(asked, wrote) for asked, wrote in stored["wrong"]]})


def evaluate_retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[Task],
    lengths: Sequence[int],
    *,
    depths: Sequence[float] = DEPTHS,
    trials: int = 5,
    seed: int = 0,
    known: Iterable[Cell] = (),
    on_cell: Callable[[Cell], None] | None = None,
) -> list[Cell]:
    """Ask questions over all lengths and depths; what was measured before is taken over.

    Questions depend on task, length, depth, trial, seed and tokenizer alone, so that two models get the same ones.

    Args:
        model: transformers' causal language model.
        tokenizer: its tokenizer, of any kind.
        tasks: `TASKS` has longattn's; anything with `Task`'s name and `question` will do.
        lengths: in tokens, question and answer included.
        depths: 0 is the start of the text, 1 its end.
        trials: questions a cell.
        seed: of what is drawn.
        known: cells of an earlier run of the same model; those of the same task, length, depth, trials and seed are
            not measured again.
        on_cell: called with each new cell, which is where to save it.

    Returns:
        A cell for each task, length and depth, in this order.

    Raises:
        ValueError: a length is too short for a question, a depth outside 0 to 1, or no trial.

    Example:
        >>> cells = evaluate_retrieval(model, tokenizer, TASKS.values(), [4096, 8192], trials=10)
    """
    check_model("evaluate_retrieval", model)
    if trials < 1:
        raise ValueError(f"evaluate_retrieval: trials must be at least 1, got {trials}")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"evaluate_retrieval: depths must be 0 to 1, got {depth}")
    found = {(cell.task, cell.length, cell.depth, cell.trials, cell.seed): cell for cell in known}
    cells = []
    for task in tasks:
        for length in lengths:
            for depth in depths:
                cell = found.get((task.name, length, depth, trials, seed))
                if cell is None:
                    cell = _measure(model, tokenizer, task, length, depth, trials, seed)
                    if on_cell:
                        on_cell(cell)
                cells.append(cell)
    return cells


def questions(
    task: Task, tokenizer: PreTrainedTokenizerBase, length: int, depth: float, trials: int, seed: int
) -> Iterator[Question]:
    """What a cell asks, the same for every model."""
    for trial in range(trials):
        yield _question(task, tokenizer, length, depth, trial, seed)


def _question(
    task: Task, tokenizer: PreTrainedTokenizerBase, length: int, depth: float, trial: int, seed: int
) -> Question:
    return task.question(tokenizer, length, depth, random.Random(f"{seed}/{task.name}/{length}/{depth}/{trial}"))


def least_length(
    task: Task,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    length: int,
    *,
    depths: Sequence[float],
    trials: int,
    seed: int,
) -> int:
    """The first length from `length` on that a task's questions were seen to fit; what is drawn hangs on the length.

    Args:
        task: as in `evaluate_retrieval`, as are `depths`, `trials` and `seed`.
        tokenizers: of the models that are to be asked.
        length: tokens to try first.
    """
    least = length
    for tokenizer, depth, trial in product(tokenizers, depths, range(trials)):
        try:
            _question(task, tokenizer, length, depth, trial, seed)
        except TooShort as error:
            least = max(least, error.least)
    if least == length:
        return length
    return least_length(task, tokenizers, least, depths=depths, trials=trials, seed=seed)


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    length: int,
    depth: float,
    trials: int,
    seed: int,
) -> Cell:
    wrong = []
    for question in questions(task, tokenizer, length, depth, trials, seed):
        room = length - len(question.ids) + 1  # the last token written is not read
        written = greedy(model, question.ids, min(question.answer_tokens + SPARE_TOKENS, room))
        text = str(tokenizer.decode(written, skip_special_tokens=True))
        if not is_answer(text, question.answer):
            wrong.append((question.answer, text))
    return Cell(task.name, length, depth, trials, trials - len(wrong), seed, wrong)


def is_answer(text: str, answer: str) -> bool:
    """Whether a text begins with the answer, space before it aside, and the answer ends there."""
    return re.match(rf"\s*{re.escape(answer)}(?!\w)", text) is not None


def greedy(model: PreTrainedModel, ids: Sequence[int], new_tokens: int) -> list[int]:
    """The likeliest next tokens one by one, whatever the model's generation config asks for, until an end of text.

    Args:
        model: transformers' causal language model.
        ids: the prompt.
        new_tokens: to write at most.

    Example:
        >>> greedy(model, tokenizer("def ")["input_ids"], 8)
    """
    from transformers import DynamicCache

    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    written: list[int] = []
    given = torch.tensor([list(ids)], device=model.device)
    # transformers 5.24 renamed the argument; the cache itself is changed in place
    renamed = "cache" in inspect.signature(model.forward).parameters
    cache = {"cache" if renamed else "past_key_values": DynamicCache(config=model.config)}
    forget_lengths(model)
    with serving(model):
        while len(written) < new_tokens and (not written or written[-1] not in ends):
            output = model(input_ids=given, use_cache=True, logits_to_keep=1, return_dict=True, **cache)
            given = output.logits[:, -1:].argmax(dim=-1)
            written.append(int(given))
    return written
