"""What a surgery says about itself: the values before and after, as a table for people and a dict for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longattn.vocab import TokenReport

__all__ = ["Change", "Report", "in_runs"]


@dataclass(frozen=True)
class Change:
    """One thing that a surgery changed.

    Args:
        what: its name, such as "max_position_embeddings" or "attention".
        before: its value before; JSON-able.
        after: its value after; JSON-able.
    """

    what: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Report:
    """What `longattn.extend` or `longattn.restore` changed, in the order in which it was changed.

    Args:
        changes: values before and after.
        tokens: how each new row of the embeddings was set, where tokens were added.
        proofs: what was looked at on the changed model, and found to hold.
        notes: what was left out, or is there beside what was asked for.

    Example:
        >>> print(Report([Change("max_position_embeddings", 4096, 32768)]))
        what                     before  after
        max_position_embeddings  4096    32768
    """

    changes: list[Change] = field(default_factory=list)
    tokens: TokenReport | None = None
    proofs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Give the report as a JSON-able dict."""
        return {
            "changes": [{"what": c.what, "before": c.before, "after": c.after} for c in self.changes],
            "tokens": None if self.tokens is None else self.tokens.to_dict(),
            "proofs": list(self.proofs),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [("what", "before", "after")]
        for change in self.changes:
            rows += _rows(change)
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{what:<{widths[0]}}  {before:<{widths[1]}}  {after}".rstrip() for what, before, after in rows]
        if not self.changes:
            lines = ["no field of the config changes"]
        if self.tokens is not None:
            lines += ["", str(self.tokens)]
        if self.proofs:
            lines += ["", *(f"checked: {proof}" for proof in self.proofs)]
        if self.notes:
            lines += ["", *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines)


def _rows(change: Change) -> list[tuple[str, str, str]]:
    """The table's rows of one change: a row a key where both sides are dicts, and only the keys that differ."""
    before, after = change.before, change.after
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [(change.what, _text(before), _text(after))]
    rows = []
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key):
            rows += _rows(Change(f"{change.what}.{key}", before.get(key), after.get(key)))
    return rows


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return in_runs([_text(entry) for entry in value])
    return str(value)


def in_runs(entries: Sequence[str]) -> str:
    """Write a list with equal neighbours counted.

    Example:
        >>> in_runs(["full", "full", "window:8"])
        '2 x full, window:8'
    """
    runs = [(entry, len(list(group))) for entry, group in groupby(entries)]
    return ", ".join(entry if count == 1 else f"{count} x {entry}" for entry, count in runs)
