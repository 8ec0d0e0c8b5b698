"""The experiment's tables and plot out of `experiment.json`; `--page` puts the tables into the page.

python benchmarks/experiment/table.py --page docs/experiment.md --plot benchmarks/results/experiment.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "experiment.json"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
Results = Mapping[str, Any]
Rows = list[Mapping[str, Any]]
COLUMNS = ("factor", "rope", "learns", "train", "serve")


def spread(values: list[float], digits: int = 2) -> str:
    """The mean over the seeds and, where there are several, half of the range."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def merged(results: Results) -> list[Rows]:
    """The rows of all seeds, those of the same name together, in their order."""
    groups: dict[str, Rows] = {}
    for row in results["rows"]:
        groups.setdefault(row["name"], []).append(row)
    return list(groups.values())


def tables(results: Results) -> str:
    """All tables, as markdown."""
    every = merged(results)
    groups = [group for group in every if group[0].get("rate") is None]
    tried = [group for group in every if group[0].get("rate") is not None]
    looked = [row for row in results["rows"] if "attention_on_first" in row and row["learns"] == "nothing"]
    scored = [group for group in groups if group[0]["learns"] == "nothing"]
    tuned = [group for group in groups if group[0]["learns"] != "nothing"]
    streamed = [group for group in groups if "streamed" in group[0]]
    parts = [_table("Bases", _bases(results))]
    if looked:
        parts.append(
            _table("Bases: the share of its attention that a head pays the row's first token", _firsts(looked))
        )
    if scored:
        parts.append(_table("Nothing trained", _lengths(scored, ("factor", "rope", "serve"))))
    if tried:
        parts.append(_table("Rates of learning that were tried", _lengths(tried, (*COLUMNS, "rate"))))
        parts.append(_table("The same: loss, speed, memory", _training(tried, (*COLUMNS, "rate"))))
    if tuned:
        parts.append(_table("Fine-tuned", _lengths(tuned, COLUMNS)))
        parts.append(_table("The fine-tunes: loss in training and on held-out rows, speed, memory", _training(tuned)))
    if streamed:
        parts.append(_table("Streaming: perplexity by the place in a long text", _streams(streamed)))
    return "\n\n".join(parts) + "\n"


def _bases(results: Results) -> list[list[str]]:
    head = ["seed", "parameters", "tokens trained", "perplexity", "recall"]
    return [
        head,
        *(
            [
                seed,
                f"{base['parameters']:,}",
                f"{base['tokens_trained']:,}",
                f"{base['perplexity']:.2f}",
                f"{base['recall']['accuracy']:.0%}",
            ]
            for seed, base in results["bases"].items()
        ),
    ]


def _firsts(rows: Rows) -> list[list[str]]:
    """The head that pays most, layer by layer, and all heads' mean."""
    layers = range(len(rows[0]["attention_on_first"]))
    head = ["seed", *(f"most in layer {layer}" for layer in layers), "mean"]
    body = []
    for row in rows:
        heads = [share for layer in row["attention_on_first"] for share in layer]
        most = [f"{max(layer):.1%}" for layer in row["attention_on_first"]]
        body.append([str(row["seed"]), *most, f"{sum(heads) / len(heads):.1%}"])
    return [head, *body]


def _lengths(groups: list[Rows], columns: tuple[str, ...]) -> list[list[str]]:
    """Perplexity and recall at every length."""
    contexts = list(groups[0][0]["perplexity"])
    head = [*_heads(columns), "seeds", *(f"ppl {n}" for n in contexts), *(f"recall {n}" for n in contexts)]
    body = []
    for group in groups:
        scores = [spread([row["perplexity"][n] for row in group]) for n in contexts]
        found = [spread([100 * row["recall"][n]["accuracy"] for row in group], 0) for n in contexts]
        body.append([*_named(group, columns), str(len(group)), *scores, *found])
    return [head, *body]


def _training(groups: list[Rows], columns: tuple[str, ...] = COLUMNS) -> list[list[str]]:
    def value(name: str, part: str | None = None) -> Callable[[Mapping[str, Any]], float]:
        return lambda row: row["training"][name] if part is None else row["training"][name][part]

    measures = {
        "loss, last steps": (value("loss"), 3),
        "held out, as trained": (value("held_out_as_trained", "loss"), 3),
        "held out, as read": (value("held_out_as_read", "loss"), 3),
        "first half group, as trained": (value("held_out_as_trained", "first"), 3),
        "as read": (value("held_out_as_read", "first"), 3),
        "tokens/s": (value("tokens_per_second"), 0),
        "peak MiB": (value("peak_mib"), 0),
    }
    head = [*_heads(columns), *measures]
    body = []
    for group in groups:
        cells = []
        for get, digits in measures.values():
            values = [get(row) for row in group if get(row) is not None]
            cells.append(spread(values, digits) if values else "")
        body.append([*_named(group, columns), *cells])
    return [head, *body]


def _streams(groups: list[Rows]) -> list[list[str]]:
    places = list(groups[0][0]["streamed"])
    columns = ("factor", "rope", "learns", "serve")
    body = [[*_named(g, columns), *(spread([row["streamed"][at] for row in g]) for at in places)] for g in groups]
    return [[*_heads(columns), *places], *body]


def _heads(columns: tuple[str, ...]) -> list[str]:
    names = {"learns": "what learns", "train": "trained with", "serve": "read with"}
    return [names.get(column, column) for column in columns]


def _named(group: Rows, columns: tuple[str, ...]) -> list[str]:
    return [str(group[0][column]) for column in columns]


def _table(title: str, lines: list[list[str]]) -> str:
    head, *body = lines
    rows = [head, ["---"] * len(head), *body]
    return f"### {title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(results: Results, path: Path) -> None:
    """Perplexity and recall over the length, of the unchanged and the four-times-longer models, before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for column, learns in enumerate(("nothing", "all")):
        for group in merged(results):
            first = group[0]
            if (
                first["factor"] != 4
                or first["learns"] != learns
                or first["train"] != "full"
                or first["serve"] != "full"
                or first.get("rate") is not None
            ):
                continue
            contexts = [int(n) for n in first["perplexity"]]
            for axis, get in (
                (axes[0][column], lambda row, n: row["perplexity"][str(n)]),
                (axes[1][column], lambda row, n: row["recall"][str(n)]["accuracy"]),
            ):
                over = [[get(row, n) for row in group] for n in contexts]
                (line,) = axis.plot(contexts, [sum(v) / len(v) for v in over], marker="o", label=first["rope"])
                axis.fill_between(
                    contexts, [min(v) for v in over], [max(v) for v in over], alpha=0.15, color=line.get_color()
                )
        axes[0][column].set(title=("nothing trained", "fine-tuned")[column], ylabel="perplexity", yscale="log")
        axes[1][column].set(xlabel="tokens", ylabel="recall", ylim=(0, 1.02))
        axes[1][column].set_xscale("log", base=2)
        if axes[0][column].lines:
            axes[0][column].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    if args.page:
        before, _, rest = args.page.read_text().partition(BEGIN)
        args.page.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n{END}{rest.partition(END)[2]}")
    else:
        print(tables(results))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
