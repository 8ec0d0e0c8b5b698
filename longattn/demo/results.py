"""The numbers of one run of the demo, and how they lie in its results.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Continuation", "Everything", "Results", "Row", "TokenResult"]


@dataclass
class Row:
    """Perplexity of one changed model at each context in tokens: as extended, and after the fine-tune."""

    name: str
    table: str
    plan: dict[str, Any] | None
    zero_shot: dict[int, float]
    tuned: dict[int, float] | None = None
    losses: list[float] = field(default_factory=list)  # of each step of the fine-tune, nats a token


@dataclass
class TokenResult:
    """What became of the new tokens.

    Args:
        ids: each new token's id.
        encoded: the ids of each new token's text, before and after.
        row_norms: the norm of each new row, and the mean of the old ones'.
        places: how often one of them is the next token in the scored windows.
        loss_zero_shot: mean of -log p there, in nats, as extended.
        loss_tuned: the same after the fine-tune.
    """

    ids: dict[str, int]
    encoded: dict[str, tuple[list[int], list[int]]]
    row_norms: dict[str, float]
    mean_row_norm: float
    places: int
    loss_zero_shot: float
    loss_tuned: float


@dataclass
class Continuation:
    """Text that a model wrote, greedily, after a prompt of `prompt_tokens` tokens that ends in `prompt_end`."""

    model: str
    prompt_tokens: int
    prompt_end: str
    text: str


@dataclass
class Everything:
    """What the plan with all parts gives: its row, the new tokens, written texts, and what it changed, as text."""

    row: Row
    tokens: TokenResult
    continuations: list[Continuation]
    report: str
    num_windows: int


@dataclass
class Results:
    """All that a run measured.

    Args:
        settings: what the run was asked for.
        versions: of Python and the packages.
        length: the shipped model's context, tokens.
        contexts: at which perplexity was measured, tokens.
        num_windows: pieces of held-out text that were scored.
        rows: the tables' rows.
        tokens: of the plan that adds some.
        continuations: texts written by the unchanged model and by the changed one.
        report: what the plan of everything changed, as text.
        findings: plain sentences computed from the above.
        seconds: wall time.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    length: int
    contexts: list[int]
    num_windows: int
    rows: list[Row]
    tokens: TokenResult
    continuations: list[Continuation]
    report: str
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self, name: str) -> list[Row]:
        """The rows of the table of this name."""
        return [row for row in self.rows if row.table == name]

    def row(self, name: str) -> Row:
        """The row of this name."""
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; JSON makes texts of the contexts that are keys."""
        return asdict(self)
