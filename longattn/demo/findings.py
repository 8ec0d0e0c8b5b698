"""What a run's numbers say, as plain sentences; every one is computed, none is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from longattn.demo.results import Results, Row

__all__ = ["findings"]

# A length is held where perplexity is at most so many times the unchanged model's at its own length.
HELD_UNTRAINED = 1.5
HELD_TUNED = 1.1
KEPT = 1.02

Value = Callable[[Row], float]


def findings(results: Results) -> list[str]:
    """The sentences, in the order of the tables."""
    sentences = [_before(results), *_untrained(results), *_tuned(results), *_attention(results), _tokens(results)]
    return [sentence for sentence in sentences if sentence]


def _before(results: Results) -> str:
    none, length, longer = results.row("none").zero_shot, results.length, _longer(results)
    times = none[longer] / none[length]
    return (
        f"Unchanged, the model's perplexity is {none[length]:.2f} at its own {length} tokens "
        f"and {none[longer]:.2f} at {longer}, {times:.1f} times as much."
    )


def _untrained(results: Results) -> list[str]:
    length, longer = results.length, _longer(results)
    base, rows = results.row("none").zero_shot[length], _methods(results)
    held, lost = _split(rows, lambda row: row.zero_shot[longer], HELD_UNTRAINED * base)
    kept, _ = _split(rows, lambda row: row.zero_shot[length], KEPT * base)
    sentences = [
        f"Without training, {_listed(held, lambda row: row.zero_shot[longer])} "
        f"{_verb(held, 'holds', 'hold')} {longer} tokens, within {HELD_UNTRAINED} times {base:.2f}"
        + (f"; {_listed(lost, lambda row: row.zero_shot[longer])} {_verb(lost, 'does', 'do')} not." if lost else ".")
    ]
    if kept:
        sentences.append(f"{_names(kept)} {_verb(kept, 'leaves', 'leave')} texts of {length} tokens as good as before.")
    return sentences


def _tuned(results: Results) -> list[str]:
    length, longer, longest = results.length, _longer(results), results.contexts[-1]
    base, steps = results.row("none").zero_shot[length], results.settings["tune_steps"]
    rows = [row for row in results.table("rope") if row.tuned]
    held, _ = _split(rows, lambda row: _tuned_at(row, longer), HELD_TUNED * base)
    further, _ = _split(rows, lambda row: _tuned_at(row, longest), HELD_UNTRAINED * base)
    sentence = (
        f"After {steps} steps at {longer} tokens, {_listed(held, lambda row: _tuned_at(row, longer))} "
        f"{_verb(held, 'is', 'are')} within {HELD_TUNED} times {base:.2f}"
    )
    none = _tuned_at(results.row("none"), longer)
    sentences = [f"{sentence}; the same steps without a change of rope give {none:.2f}."]
    if further:
        sentences.append(f"{_names(further)} then {_verb(further, 'holds', 'hold')} {longest} tokens too.")
    return sentences


def _attention(results: Results) -> list[str]:
    longest, longer = results.contexts[-1], _longer(results)
    base = results.row("none").zero_shot[results.length]
    rows = [row for row in results.table("attention") if not row.tuned]

    def worst(row: Row) -> float:
        return max(row.zero_shot[context] for context in results.contexts if context <= longer)

    held, lost = _split(rows, worst, HELD_UNTRAINED * base)
    further = [row for row in held if row.zero_shot[longest] <= HELD_UNTRAINED * base]
    sentences = [
        f"Attention changed, nothing trained: at every length up to {longer} tokens {_listed(held, worst)} "
        f"{_verb(held, 'stays', 'stay')} within {HELD_UNTRAINED} times {base:.2f}"
        + (f"; {_listed(lost, worst)} {_verb(lost, 'does', 'do')} not." if lost else ".")
    ]
    if further:
        sentences.append(f"{_names(further)} {_verb(further, 'holds', 'hold')} {longest} tokens too.")
    for row in results.table("attention"):
        same_rope = next((other for other in _methods(results) if row.name.startswith(f"{other.name} ")), None)
        if row.tuned and same_rope is not None:
            sentences.append(
                f"Trained in shifted groups and served with full attention, {same_rope.name} reaches "
                f"{_tuned_at(row, longer):.2f} at {longer} tokens; trained with full attention, "
                f"{_tuned_at(same_rope, longer):.2f}."
            )
    return sentences


def _tokens(results: Results) -> str:
    tokens = results.tokens
    one = all(len(after) == 1 for _, after in tokens.encoded.values())
    return (
        f"The new tokens {' and '.join(map(repr, tokens.ids))} are {'one id each' if one else 'NOT one id each'}; "
        f"the loss where one comes next goes from {tokens.loss_zero_shot:.2f} to {tokens.loss_tuned:.2f} nats "
        f"in the fine-tune."
    )


def _methods(results: Results) -> list[Row]:
    return [row for row in results.table("rope") if row.plan is not None]


def _longer(results: Results) -> int:
    return results.length * results.settings["factor"]


def _tuned_at(row: Row, context: int) -> float:
    if row.tuned is None:
        raise ValueError(f"findings: the row {row.name!r} was not fine-tuned")
    return row.tuned[context]


def _split(rows: Sequence[Row], value: Value, limit: float) -> tuple[list[Row], list[Row]]:
    """The rows up to the limit and those above it, each from the lowest value on."""
    ordered = sorted(rows, key=value)
    return [row for row in ordered if value(row) <= limit], [row for row in ordered if value(row) > limit]


def _listed(rows: Sequence[Row], value: Value) -> str:
    return ", ".join(f"{row.name} ({value(row):.2f})" for row in rows) or "no change"


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(row.name for row in rows)


def _verb(rows: Sequence[Row], one: str, several: str) -> str:
    return several if len(rows) > 1 else one
