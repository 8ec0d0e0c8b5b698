"""What `longattn train` is asked for: the keys of its YAML, their checks; changes with what a run can be told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from os import PathLike
from typing import Any

from longattn.plan import Plan
from longattn.plan_yaml import load_yaml
from longattn.rope_keys import nearest

__all__ = ["TrainSpec"]

RECIPES = ("longlora", "full", "new-rows")
SCHEDULES = ("constant_with_warmup", "cosine", "linear")
PLAN_KEYS = tuple(part.name for part in fields(Plan))
# What a run that goes on may change: nothing that its weights depend on.
FREE_ON_RESUME = ("resume", "save_every", "log_every")


def _count(at_least: int) -> Callable[[Any], str | None]:
    def wanted(value: Any) -> str | None:
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= at_least
        return None if whole else f"an int of at least {at_least}"

    return wanted


def _positive(value: Any) -> str | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return None if number else "a number above 0"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "a text"


def _texts(value: Any) -> str | None:
    texts = isinstance(value, (list, tuple)) and value and all(isinstance(entry, str) for entry in value)
    return None if texts else "a list of texts"


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    return lambda value: None if value in choices else f"one of {', '.join(choices)}"


def _key(check: Callable[[Any], str | None], default: Any = MISSING, recipe: str | None = None) -> Any:
    """A key, its check, which says what is wanted where a value is not that, and the one recipe that it is for."""
    return field(default=default, metadata={"check": check, "recipe": recipe})


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """A training run, as one YAML file says it; the keys of a plan stand beside these.

    Args:
        model: a checkpoint's folder, or the id of a model on the Hub.
        text: what to train on, as `longattn.train.read_texts` takes it.
        length: tokens of a row.
        steps: optimizer steps.
        out: the folder of the run.
        plan: what to change first; None trains the checkpoint as it is.
        recipe: "longlora", "full" (all weights learn) or "new-rows" (only those of new tokens).
        eval_text: held-out text, whose loss is measured as the model serves.
        field: the column of the text, where it has columns.
        separate_documents: whether no query sees another document of its row.
        batch: rows of a forward.
        accumulate: forwards of a step.
        learning_rate: its peak.
        schedule: how it goes on after the warm-up.
        warmup: steps until the peak, no more than all; by default a tenth of them, 20 at most.
        rank, alpha, train_embeddings, train_norms: LongLoRA's, as `longattn.train.longlora`.
        new_tokens: tokens whose rows learn; by default those of the plan.
        adapter: "merge" folds what was trained into the checkpoint, "keep" writes it beside it.
        bf16: matrix products in bfloat16; weights that learn stay float32, and so do frozen ones unless the
            checkpoint is bfloat16 itself.
        gradient_checkpointing: form activations anew in the backward, which keeps less of them.
        seed: of the rows' order, and of adapters.
        log_every, save_every, eval_every: steps between entries of the log, checkpoints, evaluations.
        resume: go on from the last checkpoint in `out`, where there is one.

    Raises:
        TypeError, ValueError: a key is missing, unknown or has an impossible value.

    Example:
        >>> spec = TrainSpec.from_yaml("train.yaml")
        >>> longattn.train.train(spec)
    """

    model: str = _key(_text)
    text: str = _key(_text)
    length: int = _key(_count(2))
    steps: int = _key(_count(1))
    out: str = _key(_text)
    plan: Plan | None = None
    recipe: str = _key(_one_of(*RECIPES), "longlora")
    eval_text: str | None = _key(_text, None)
    field: str = _key(_text, "text")
    separate_documents: bool = _key(_flag, False)
    batch: int = _key(_count(1), 1)
    accumulate: int = _key(_count(1), 1)
    learning_rate: float = _key(_positive, 2e-5)
    schedule: str = _key(_one_of(*SCHEDULES), "constant_with_warmup")
    warmup: int | None = _key(_count(0), None)
    rank: int = _key(_count(1), 8, "longlora")
    alpha: float | None = _key(_positive, None, "longlora")
    train_embeddings: bool = _key(_flag, True, "longlora")
    train_norms: bool = _key(_flag, True, "longlora")
    new_tokens: tuple[str, ...] | None = _key(_texts, None)
    adapter: str = _key(_one_of("merge", "keep"), "merge")
    bf16: bool = _key(_flag, False)
    gradient_checkpointing: bool = _key(_flag, False)
    seed: int = _key(_count(0), 0)
    log_every: int = _key(_count(1), 1)
    save_every: int = _key(_count(1), 100)
    eval_every: int | None = _key(_count(1), None)
    resume: bool = _key(_flag, False)

    def __post_init__(self) -> None:
        for key in fields(self):
            value = getattr(self, key.name)
            if key.name == "plan" or (value is None and key.default is None):
                continue
            wanted = key.metadata["check"](value)
            if wanted is not None:
                raise ValueError(f"train: {key.name} must be {wanted}, got {value!r}")
            only = key.metadata["recipe"]
            if only is not None and self.recipe != only and value != key.default:
                raise ValueError(f"train: {key.name} is for the recipe {only}, got it with {self.recipe}")
        self._check_together()

    def _check_together(self) -> None:
        if self.recipe == "full" and self.adapter == "keep":
            raise ValueError("train: adapter must be merge with the recipe full, which has none, got keep")
        if self.recipe == "full" and self.new_tokens is not None:
            raise ValueError("train: new_tokens must be left out with the recipe full, which trains all rows")
        if self.recipe == "new-rows" and not self.tokens:
            raise ValueError("train: the recipe new-rows needs tokens in the plan, or new_tokens that the model has")
        if self.warmup is not None and self.warmup > self.steps:
            raise ValueError(f"train: warmup must be at most steps, {self.steps}, got {self.warmup}")
        if self.eval_every is not None and self.eval_text is None:
            raise ValueError("train: eval_every needs eval_text, got none")

    @property
    def warmup_steps(self) -> int:
        """Steps until the learning rate's peak."""
        return min(20, self.steps // 10) if self.warmup is None else self.warmup

    @property
    def tokens(self) -> list[str]:
        """The tokens whose rows learn even where the rest of their matrix does not."""
        if self.new_tokens is not None:
            return list(self.new_tokens)
        return [] if self.plan is None or self.plan.tokens is None else _names(self.plan.tokens["tokens"])

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> TrainSpec:
        """Make a run of a mapping with the keys of this class and those of a plan.

        Raises:
            TypeError, ValueError: it is no mapping, or as the class.
        """
        if not isinstance(mapping, Mapping):
            raise TypeError(f"train: the run must be a mapping with keys such as model, text, steps, got {mapping!r}")
        own = [key.name for key in fields(cls) if key.name != "plan"]
        known = [*own, *PLAN_KEYS]
        for key in mapping:
            if key not in known:
                raise ValueError(
                    f"train: unknown key {key!r}{nearest(str(key), known)}; the keys are {', '.join(known)}"
                )
        missing = [key.name for key in fields(cls) if key.default is MISSING and key.name not in mapping]
        if missing:
            raise ValueError(f"train: {', '.join(missing)} must be given; got the keys {', '.join(map(str, mapping))}")
        parts = {key: mapping[key] for key in PLAN_KEYS if mapping.get(key) is not None}
        plan = Plan.from_dict(parts) if parts else None
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in mapping.items()
        }
        return cls(plan=plan, **{key: values[key] for key in own if key in values})

    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> TrainSpec:
        """Read a run from a YAML file with the keys of `from_dict`.

        Raises:
            OSError: the file can't be read.
            TypeError, ValueError: it is not YAML, repeats a key, or as `from_dict`.
        """
        with open(path, encoding="utf-8") as file:
            return cls.from_dict(load_yaml(file, str(path)))

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` makes the same run of, in JSON's types, without what is left at its default."""
        given = {key.name: getattr(self, key.name) for key in fields(self) if key.name != "plan"}
        own = {
            key.name: given[key.name] for key in fields(self) if key.name in given and given[key.name] != key.default
        }
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        return {**own, **({} if self.plan is None else self.plan.to_dict())}

    def check_resumes(self, earlier: TrainSpec) -> None:
        """Refuse to go on with a run that was begun otherwise.

        Raises:
            ValueError: a key that the weights depend on differs; says which.
        """
        now, then = self.to_dict(), earlier.to_dict()
        for name in dict.fromkeys([*then, *now]):
            if name not in FREE_ON_RESUME and now.get(name) != then.get(name):
                raise ValueError(
                    f"train: {name} must be that of the run in {self.out}, {then.get(name, 'the default')!r}, to go on "
                    f"with it, got {now.get(name, 'the default')!r}"
                )


def _names(tokens: Any) -> list[str]:
    """Every token of a plan's `tokens`, which is a list, or a mapping from role to a token or several."""
    entries = list(tokens.values()) if isinstance(tokens, Mapping) else list(tokens)
    flat = [name for entry in entries for name in (entry if isinstance(entry, (list, tuple)) else [entry])]
    return [name if isinstance(name, str) else name.content for name in flat]
