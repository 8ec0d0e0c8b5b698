"""Which changes the demo makes: a plan for each row of its tables; changes with what the demo is to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from longattn.plan import Plan

__all__ = ["NEW_TOKENS", "ROPE_METHODS", "Change", "attention_changes", "everything_change", "rope_changes"]

# a raise by which the slowest wavelengths grow about as much as the usual 10000 -> 500000 of long-context training
RAISED_THETA = 500000.0
SINKS = 4
# Plain tokens, so that the tokenizer itself finds them in every text, and a fine-tune meets them.
NEW_TOKENS = ("self", "return")
ROPE_METHODS = ("linear", "ntk", "dynamic", "abf", "by-parts", "yarn", "llama3")
# The one under the attention rows and in the plan of everything; a fixed choice, not the run's best.
MAIN_METHOD = "yarn"


@dataclass(frozen=True)
class Change:
    """One row: its name, in which table it stands, the plan (None changes nothing), whether it is fine-tuned too."""

    name: str
    table: Literal["rope", "attention", "everything"]
    plan: Plan | None
    tuned: bool = True

    @property
    def folder(self) -> str:
        """The name as that of a folder on any file system."""
        return "".join(letter if letter.isalnum() or letter in "-+" else "-" for letter in self.name)


def rope_changes(methods: Sequence[str], length: int, factor: int) -> list[Change]:
    """The unchanged model, and a plan for each rope method, to `factor` times the model's `length` tokens."""
    unknown = [method for method in methods if method not in ROPE_METHODS]
    if unknown:
        raise ValueError(f"demo: methods must be of {', '.join(ROPE_METHODS)}, got {unknown[0]!r}")
    changes = [Change("none", "rope", None)]
    for method in methods:
        context = length * factor if method == "abf" else None
        changes.append(Change(method, "rope", Plan(rope=_rope(method, factor), context=context)))
    return changes


def attention_changes(length: int, factor: int) -> list[Change]:
    """Plans of windows and shifted groups as long as the trained context, with the old rope and with a scaled one."""
    longer, window, group = length * factor, f"window:{length}", f"group:{length}+shift"
    sinks, rope = f"{window}+sinks:{SINKS}", _rope(MAIN_METHOD, factor)
    return [
        Change(window, "attention", Plan(context=longer, attention=window), tuned=False),
        Change(sinks, "attention", Plan(context=longer, attention=sinks), tuned=False),
        Change(group, "attention", Plan(context=longer, attention=group), tuned=False),
        Change(f"{MAIN_METHOD} with {sinks}", "attention", Plan(rope=rope, attention=sinks), tuned=False),
        Change(
            f"{MAIN_METHOD} trained in {group}", "attention", Plan(rope=rope, attention="full", train_attention=group)
        ),
    ]


def everything_change(length: int, factor: int) -> Change:
    """One plan with all parts: rope, mixed attention, training in shifted groups, and two new tokens."""
    tokens: dict[str, Any] = {"tokens": list(NEW_TOKENS), "special": False, "init": "subwords"}
    plan = Plan(
        rope=_rope(MAIN_METHOD, factor),
        attention=f"1 x full, 2 x window:{length}+sinks:{SINKS}",
        train_attention=f"group:{length}+shift",
        tokens=tokens,
    )
    return Change("everything", "everything", plan)


def _rope(method: str, factor: int) -> dict[str, Any]:
    if method == "abf":
        return {"rope_theta": RAISED_THETA}
    return {"rope_type": method, "factor": float(factor)}
