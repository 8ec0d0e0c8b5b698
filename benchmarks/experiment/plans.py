"""The rows of the experiment: how each changes a base, how it trains, and with what it is read afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from longattn.plan import Plan

FACTORS = (4, 8)
SINKS = 4
# a raise by which the slowest wavelengths grow about as much as the usual 10000 -> 500000 of long-context training
RAISED_THETA = 500000.0
METHODS = ("none", "linear", "ntk", "dynamic", "abf", "by-parts", "yarn", "llama3")
Learns = Literal["nothing", "all", "lora", "lora+embeddings+norms"]
# what learns -> its rate of learning: the best of those tried, by the held-out loss of the first seed
RATES: dict[Learns, float] = {"all": 1e-3, "lora": 3e-3, "lora+embeddings+norms": 3e-3}
TRIED: dict[Learns, tuple[float, ...]] = {"all": (3e-4, 1e-3, 3e-3), "lora+embeddings+norms": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class Row:
    """One change of a base of `length` tokens to `factor` times that, trained there or not.

    Args:
        rope: a rope method.
        factor: the new length over the base's.
        learns: which weights the fine-tune moves.
        train: the pattern of training: one of a plan's, or "leaking", LongLoRA's roll.
        serve: the pattern that the model is read with.
        rate: of learning, in the rows that choose those of `RATES`, for one seed.
    """

    rope: str
    factor: int
    learns: Learns = "nothing"
    train: str = "full"
    serve: str = "full"
    rate: float | None = None

    @property
    def name(self) -> str:
        """What tells rows of the same base apart, fit for a file's name."""
        parts = [f"x{self.factor}", self.rope]
        if self.learns != "nothing":
            parts += [self.learns, f"trained-{self.train}"]
        if self.rate is not None:
            parts.append(f"rate-{self.rate:g}")
        return "_".join([*parts, f"read-{self.serve}"]).replace(":", "")

    def plan(self, length: int) -> Plan | None:
        """The plan of the change; None where nothing is changed."""
        attention = None if self.serve == self.train == "full" or self.train == "leaking" else self.serve
        train = self.train if attention and self.train != self.serve else None
        context = self.factor * length
        if self.rope == "none":
            return Plan(context=context, attention=attention, train_attention=train) if attention else None
        if self.rope == "abf":
            rope: Mapping[str, Any] = {"rope_theta": RAISED_THETA}
            return Plan(rope=rope, context=context, attention=attention, train_attention=train)
        rope = {"rope_type": self.rope, "factor": float(self.factor)}
        return Plan(rope=rope, attention=attention, train_attention=train)


def rows(length: int) -> Iterator[Row]:
    """All rows for a base of `length` tokens, those that most depends on first."""
    group, window = f"group:{length}", f"window:{length}"
    sinks = f"{window}+sinks:{SINKS}"
    for factor in FACTORS:
        for method in METHODS:
            if method != "none" or factor == FACTORS[0]:
                yield Row(method, factor)
    first, further = FACTORS
    for learns, rates in TRIED.items():
        for rate in rates:
            yield Row("linear", first, learns, rate=rate)
    for pattern in (window, sinks):
        yield Row("none", first, serve=pattern)
        yield Row("yarn", further, serve=pattern)
    # interpolation is LongLoRA's choice, and the one that needs training
    for train in ("full", group, f"{group}+shift", "leaking"):
        yield Row("linear", first, "all", train)
    for learns in ("lora", "lora+embeddings+norms"):
        for train in ("full", f"{group}+shift"):
            yield Row("linear", first, learns, train)
    for pattern in (window, sinks):
        yield Row("none", first, "all", pattern, pattern)
    for train in ("full", group, f"{group}+shift"):
        yield Row("yarn", first, "all", train)
    for train in ("full", group, f"{group}+shift", "leaking"):
        yield Row("linear", further, "all", train)
    for method in METHODS:
        if method not in ("linear", "yarn"):
            yield Row(method, first, "all")
    for pattern in (window, sinks):
        yield Row("yarn", further, "all", pattern, pattern)
    for train in ("full", f"{group}+shift"):
        yield Row("linear", further, "lora+embeddings+norms", train)
