"""The demo's tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from longattn.demo.results import Results, Row

__all__ = ["print_results"]

MEANINGS = {
    "none": "no change",
    "linear": "position interpolation",
    "ntk": "NTK-aware base",
    "dynamic": "NTK by length",
    "abf": "raised rope_theta",
    "by-parts": "NTK by parts",
    "yarn": "YaRN",
    "llama3": "Llama 3",
}


def print_results(results: Results, console: Console) -> None:
    """Print the tables, the new tokens, the written texts and the findings."""
    longer, steps = results.length * results.settings["factor"], results.settings["tune_steps"]
    console.print(
        f"\nPerplexity per byte of the same last bytes of {results.num_windows} held-out pieces of Python's standard "
        f"library, by the tokens in sight. Trained context {results.length}, extended to {longer}; "
        f"fine-tuned for {steps} steps at {longer}.\n",
        highlight=False,
    )
    console.print(_table("Rope methods", results, results.table("rope")))
    console.print(_table("Attention patterns", results, results.table("attention")))
    console.print(_table("One plan with all parts", results, results.table("everything")))
    for title, body in (
        ("What that plan changed", Text(results.report)),
        ("New tokens", _tokens(results)),
        ("What the models write (greedily)", _texts(results)),
        ("Findings", Group(*(Padding(Text(f"- {line}"), 0) for line in results.findings))),
    ):
        console.print(Text(f"\n{title}", style="bold"))
        console.print(Padding(body, (0, 0, 0, 2)))


def _table(title: str, results: Results, rows: Sequence[Row]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    table.add_column("tokens in sight", no_wrap=False, min_width=22)
    for _ in range(2):
        for context in results.contexts:
            table.add_column(str(context), justify="right", no_wrap=True)
    half = len(results.contexts)
    table.columns[1].header, table.columns[1 + half].header = (
        f"as is\n{results.contexts[0]}",
        f"tuned\n{results.contexts[0]}",
    )
    for index, column in enumerate(table.columns):
        if index not in (1, 1 + half):
            column.header = f"\n{column.header}"
    base = results.row("none").zero_shot[results.length]
    for row in rows:
        tuned = row.tuned or {}
        values = [row.zero_shot.get(context) for context in results.contexts]
        values += [tuned.get(context) for context in results.contexts]
        table.add_row(_label(row), *(_cell(value, base) for value in values))
    return table


def _label(row: Row) -> Text:
    meaning = MEANINGS.get(row.name)
    return Text(row.name) if meaning is None else Text.assemble(row.name, (f" ({meaning})", "dim"))


def _cell(value: float | None, base: float) -> Text:
    """Green up to 1.1 times the unchanged model at its own length, red from twice that on."""
    if value is None:
        return Text("-", style="dim")
    style = "green" if value <= 1.1 * base else "red" if value >= 2 * base else ""
    return Text(f"{value:.2f}", style=style)


def _tokens(results: Results) -> Text:
    tokens = results.tokens
    lines = [
        f"{token!r}: {before} -> {after}; norm of its row {tokens.row_norms[token]:.3f}, "
        f"of old ones {tokens.mean_row_norm:.3f}"
        for token, (before, after) in tokens.encoded.items()
    ]
    lines.append(
        f"-log p at the {tokens.places} places where one comes next: {tokens.loss_zero_shot:.2f} nats as extended, "
        f"{tokens.loss_tuned:.2f} fine-tuned"
    )
    return Text("\n".join(lines))


def _texts(results: Results) -> RenderableType:
    parts: list[RenderableType] = []
    for one in results.continuations:
        parts.append(Text(f"{one.model}, after {one.prompt_tokens} tokens that end in:", style="dim"))
        parts.append(Padding(Text.assemble((one.prompt_end, "dim"), (one.text.rstrip(), "bold")), (0, 0, 1, 2)))
    return Group(*parts)
