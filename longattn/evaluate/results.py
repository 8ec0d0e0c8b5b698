"""What an evaluation asks for and what it found, and how both lie in JSON, which an interrupted one goes on from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from longattn.evaluate.perplexity import Score, SlidingScore
from longattn.evaluate.retrieval import DEPTHS, Cell
from longattn.evaluate.tasks import TASKS

__all__ = ["Evaluation", "ModelScores", "Settings", "read_evaluation", "write_evaluation"]

# A different value of these asks for other numbers; the rest only asks for more or fewer of the same.
ASKED_ALIKE = ("last", "stride", "trials", "seed", "dtype")


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        lengths: in tokens; ascending, each once.
        last: tokens at the end of a piece of text that are scored, about: as many characters as that many tokens have.
        windows: pieces of text to score.
        stride: tokens between sliding windows.
        sliding_windows: at each length, at most; 0 leaves them out.
        tasks: names of retrieval tasks, of `TASKS`.
        depths: where answers stand.
        trials: questions for each task, length and depth.
        seed: of the questions.
        dtype: that the model computes in; "auto" is the checkpoint's own.

    Raises:
        ValueError: a value is out of range.
    """

    lengths: Sequence[int]
    last: int = 256
    windows: int = 16
    stride: int = 256
    sliding_windows: int = 16
    tasks: Sequence[str] = ()
    depths: Sequence[float] = DEPTHS
    trials: int = 5
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not self.lengths or sorted(set(self.lengths)) != list(self.lengths):
            raise ValueError(f"eval: lengths must be one or more, ascending, got {list(self.lengths)}")
        for name, least in (("last", 1), ("windows", 1), ("stride", 1), ("trials", 1), ("sliding_windows", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"eval: {name} must be at least {least}, got {getattr(self, name)}")
        if self.lengths[0] <= self.last:
            raise ValueError(
                f"eval: lengths must be above the last {self.last} tokens, which are scored, got {self.lengths[0]}; "
                "score fewer (--last)"
            )
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown:
            raise ValueError(f"eval: retrieval must be of {', '.join(TASKS)}, got {unknown[0]!r}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"eval: retrieval must name each task once, got {', '.join(self.tasks)}")


@dataclass
class ModelScores:
    """What one model scored.

    Args:
        name: as it was given.
        role: "before" or "after"; "model" where there is one alone.
        weights: a digest of its weights and config.
        facts: its family, parameters, length, rope and patterns, for people.
        plans: what longattn's record of it says was done, oldest first.
        last: perplexity of the same last tokens, by context.
        sliding: sliding-window perplexity, by length.
        cells: retrieval, by task, length and depth.
    """

    name: str
    role: str
    weights: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    plans: list[dict[str, Any]] = field(default_factory=list)
    last: list[Score] = field(default_factory=list)
    sliding: list[SlidingScore] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    def score(self, context: int) -> Score | None:
        """The score of the same last tokens at a context."""
        return next((score for score in self.last if score.context == context), None)

    def slid(self, length: int) -> SlidingScore | None:
        """The sliding-window scores at a length."""
        return next((score for score in self.sliding if score.length == length), None)

    def accuracy(self, task: str) -> float:
        """Share of all of a task's questions answered exactly, NaN where none was asked yet."""
        cells = [cell for cell in self.cells if cell.task == task]
        return sum(cell.correct for cell in cells) / sum(cell.trials for cell in cells) if cells else math.nan

    def with_rest_of(self, earlier: ModelScores) -> ModelScores:
        """These scores, and those of an earlier run beyond them: not taken over yet, or not asked for again."""
        cells = {(cell.task, cell.length, cell.depth) for cell in self.cells}
        return replace(
            self,
            **({} if self.weights else {name: getattr(earlier, name) for name in ("weights", "facts", "plans")}),
            last=sorted(
                self.last + [one for one in earlier.last if self.score(one.context) is None],
                key=lambda score: score.context,
            ),
            sliding=sorted(
                self.sliding + [one for one in earlier.sliding if self.slid(one.length) is None],
                key=lambda score: score.length,
            ),
            cells=self.cells + [one for one in earlier.cells if (one.task, one.length, one.depth) not in cells],
        )

    def asked(self, settings: Settings) -> ModelScores:
        """Those of these scores that `settings` ask for."""
        return replace(
            self,
            last=[score for score in self.last if score.context in settings.lengths],
            sliding=[score for score in self.sliding if score.length in settings.lengths],
            cells=[
                cell
                for cell in self.cells
                if cell.task in settings.tasks and cell.length in settings.lengths and cell.depth in settings.depths
            ],
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        parts = {name: [one.to_dict() for one in getattr(self, name)] for name in ("last", "sliding", "cells")}
        facts = {name: getattr(self, name) for name in ("name", "role", "weights", "facts", "plans")}
        return {**facts, **parts}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> ModelScores:
        """What `to_dict` gave."""
        kinds = {"last": Score, "sliding": SlidingScore, "cells": Cell}
        parts = {name: [kind.from_dict(one) for one in stored[name]] for name, kind in kinds.items()}  # type: ignore[attr-defined]
        return cls(**{**stored, **parts})


@dataclass
class Evaluation:
    """One or two models' scores, and how they came about.

    Args:
        settings: what the last run asked for.
        text: name, documents, characters and a digest of the text; and of the pieces cut from it.
        models: "before" comes first; in a file that other runs went into too, with the scores of those.
        machine: what it ran on.
        commands: that made it, one a run.
        complete: whether all that was asked for is there.
    """

    settings: Settings
    text: dict[str, Any]
    models: list[ModelScores]
    machine: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def pieces(self) -> str:
        """How many pieces of text were scored, in words, and how many more would have been."""
        left_out = self.text.get("pieces_left_out")  # which files of earlier versions lack
        more = f" ({left_out} more did not fit the lengths)" if left_out else ""
        return f"{self.text['pieces']} pieces{more}"

    @property
    def stride(self) -> str:
        """The stride of sliding windows in words, of each length where one is too short for what was asked for."""
        used = {score.length: score.stride for score in self.models[0].sliding}
        if set(used.values()) <= {self.settings.stride}:
            return f"stride {self.settings.stride}"
        return "stride " + ", ".join(f"{stride} at {length:,}" for length, stride in used.items())

    def asked(self) -> Evaluation:
        """The same without scores that earlier runs asked for and the last one did not."""
        return replace(self, models=[model.asked(self.settings) for model in self.models])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "complete": self.complete,
            "settings": asdict(self.settings),
            "text": self.text,
            "machine": self.machine,
            "commands": self.commands,
            "models": [model.to_dict() for model in self.models],
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Evaluation:
        """What `to_dict` gave."""
        models = [ModelScores.from_dict(model) for model in stored["models"]]
        return cls(**{**stored, "settings": Settings(**stored["settings"]), "models": models})


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write JSON, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(evaluation.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_evaluation(path: Path) -> Evaluation:
    """Read what `write_evaluation` wrote.

    Raises:
        ValueError: the file holds something else.

    Example:
        >>> read_evaluation(Path("scores.json")).models[0].score(4096).perplexity
    """
    try:
        return Evaluation.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"eval: --json {path} must be new, or written by longattn eval, got something else") from None


def known_scores(earlier: Evaluation, now: Evaluation, path: Path) -> list[ModelScores]:
    """The models of an earlier run, if it measured the same things.

    Raises:
        ValueError: it did not, and what differs.
    """
    then, wanted = asdict(earlier.settings), asdict(now.settings)
    alike = [*ASKED_ALIKE, *(["sliding_windows"] if then["sliding_windows"] and wanted["sliding_windows"] else [])]
    pairs = {name: (_models(earlier).get(name), given) for name, given in _models(now).items()}
    pairs |= {name: (then[name], wanted[name]) for name in alike}
    digests = (earlier.text["pieces_digest"], now.text["pieces_digest"])
    if digests[0] != digests[1]:  # of which the cause is named, where it is known
        pairs |= {"windows": (then["windows"], wanted["windows"]), "text": (earlier.text["name"], now.text["name"])}
        pairs |= {"lengths": (then["lengths"], wanted["lengths"]), "scored text's digest": digests}
    for name, (old_value, value) in pairs.items():
        if old_value != value:
            raise ValueError(
                f"eval: --json {path} holds another evaluation, whose {name} differs: expected {old_value}, got "
                f"{value}; ask for what it holds, or give another file"
            )
    return earlier.models


def _models(evaluation: Evaluation) -> dict[str, str]:
    """The models by the arguments that name them."""
    given = {"--before" if model.role == "before" else "model": model.name for model in evaluation.models}
    return {"--before": "none", **given}
