"""The report: one HTML page that holds all of an evaluation and asks for nothing else."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from longattn.evaluate.charts import Line, line_chart
from longattn.evaluate.page_style import STYLE
from longattn.evaluate.results import Evaluation, ModelScores
from longattn.plan_yaml import dump_yaml
from longattn.units import format_perplexity

__all__ = ["page_of", "write_page"]

Value = Callable[[ModelScores, int], float]
SHOWN_WRONG = 12
DEEP = 0.6  # share of a heat map's colour from which text on it is light


def write_page(evaluation: Evaluation, path: Path) -> None:
    """Write `page_of` an evaluation.

    Example:
        >>> write_page(read_evaluation(Path("scores.json")), Path("report.html"))
    """
    path.write_text(page_of(evaluation), encoding="utf-8")


def page_of(evaluation: Evaluation) -> str:
    """The page as HTML: what was found, charts and tables, the plan, and how to make it again."""
    evaluation = evaluation.asked()
    models = evaluation.models
    title = models[-1].name if len(models) == 1 else f"{models[-1].name}, before and after"
    parts = [_found(evaluation), _last(evaluation), _sliding(evaluation)]
    parts += [_retrieval(evaluation, task) for task in evaluation.settings.tasks]
    parts += [_structure(evaluation), _made(evaluation)]
    date = str(evaluation.machine.get("date", ""))[:10]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n"
        f'<p class="soft">Long text, measured by longattn eval on {escape(date)}: {_text_facts(evaluation)}.</p>\n'
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _text_facts(evaluation: Evaluation) -> str:
    text = evaluation.text
    return escape(
        f"{evaluation.pieces} of {text['name']}, {text['documents']} texts of {text['characters']:,} characters"
    )


def findings(evaluation: Evaluation) -> list[str]:
    """What the numbers say, as plain sentences; every one is computed.

    Example:
        >>> findings(read_evaluation(Path("scores.json")))
    """
    models, lengths = evaluation.asked().models, evaluation.settings.lengths
    first, last = lengths[0], lengths[-1]
    after, sentences = models[-1], []
    for model in models:
        start, end = _last_value(model, first), _last_value(model, last)
        change = "a lower one: it uses the text" if end < start else "a higher one: more text harms"
        if not (math.isfinite(start) and math.isfinite(end)):
            change = "no number to compare"
        elif abs(end / start - 1) < 0.01:
            change = "about the same"
        sentences.append(
            f"Perplexity of {_named(model)}: {format_perplexity(start)} with {first:,} tokens in sight, "
            f"{format_perplexity(end)} with {last:,}, {change}."
        )
    if len(models) == 2:
        for length in dict.fromkeys((first, last)):
            was, now = _last_value(models[0], length), _last_value(after, length)
            sentences.append(
                f"With {length:,} tokens: {format_perplexity(was)} before, {format_perplexity(now)} after"
                + (f", {now / was - 1:+.1%}." if math.isfinite(now / was) else ".")
            )
    for task in evaluation.settings.tasks:
        rates = ", ".join(f"{_named(model)} {_share(model.accuracy(task))}" for model in models)
        sentences.append(f"Answers found, {task}: {rates}.")
    return sentences


def _share(accuracy: float) -> str:
    return "not asked yet" if math.isnan(accuracy) else f"{accuracy:.0%}"


def _found(evaluation: Evaluation) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(evaluation))
    incomplete = (
        "" if evaluation.complete else "<p><strong>This evaluation did not end; numbers are missing.</strong></p>"
    )
    return f'<section><h2>What was found</h2>{incomplete}<ul class="found">{items}</ul></section>'


def _last(evaluation: Evaluation) -> str:
    settings, models = evaluation.settings, evaluation.models
    marks: dict[int, str] = {}
    for model in models:
        length = model.facts.get("length", "")
        if length.isdigit():
            marks.setdefault(int(length), f"length of {_named(model)}")
    chart = line_chart(
        [Line(_named(model), model.role, [(s.context, s.perplexity) for s in model.last]) for model in models],
        x_label="tokens in sight",
        y_label="perplexity per token",
        marks=list(marks.items()),
    )
    tables = [_by_length(evaluation, "perplexity per token", _last_value)]
    tables.append(_by_length(evaluation, "perplexity per byte, comparable between tokenizers", _byte_value))
    return (
        "<section><h2>The same last tokens, with more and more text before them</h2>"
        f'<p class="soft">About {settings.last} tokens at the end of {evaluation.pieces} are scored at '
        "every length, so that what changes is what the model makes of the text before them. Lower is better.</p>"
        f"<figure>{chart}</figure>{''.join(tables)}</section>"
    )


def _sliding(evaluation: Evaluation) -> str:
    if not evaluation.settings.sliding_windows:
        return ""
    counts = ", ".join(f"{score.windows} of {score.length:,}" for score in evaluation.models[-1].sliding)
    return (
        "<section><h2>Sliding windows, as papers report them</h2>"
        f'<p class="soft">{evaluation.stride.capitalize()}; windows: {escape(counts)} tokens. Compare rows, '
        "not columns, which score different tokens.</p>"
        + _by_length(evaluation, "LongLoRA (arXiv:2309.12307): all tokens of every window", _longlora_value)
        + _by_length(evaluation, "YaRN (arXiv:2309.00071): each token once, the last of each window", _yarn_value)
        + "</section>"
    )


def _last_value(model: ModelScores, length: int) -> float:
    score = model.score(length)
    return math.nan if score is None else score.perplexity


def _byte_value(model: ModelScores, length: int) -> float:
    score = model.score(length)
    return math.nan if score is None else score.byte_perplexity


def _longlora_value(model: ModelScores, length: int) -> float:
    score = model.slid(length)
    return math.nan if score is None else score.longlora


def _yarn_value(model: ModelScores, length: int) -> float:
    score = model.slid(length)
    return math.nan if score is None else score.yarn


def _by_length(evaluation: Evaluation, caption: str, value: Value) -> str:
    """A row a model, a column a length; of two models, how the second relates to the first."""
    lengths, models = evaluation.settings.lengths, evaluation.models
    rows = [
        _row(_named(model), [format_perplexity(value(model, length)) for length in lengths], model.role)
        for model in models
    ]
    if len(models) == 2:
        cells = []
        for length in lengths:
            ratio = value(models[1], length) / value(models[0], length)
            better = "better" if ratio < 1 else "worse" if ratio > 1 else ""
            cells.append(f'<td class="{better}">{f"{ratio - 1:+.1%}" if math.isfinite(ratio) else "-"}</td>')
        rows.append(f"<tr><th>change</th>{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{length:,}</th>' for length in lengths)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr><th scope="col">tokens</th>{head}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(name: str, cells: Iterable[str], kind: str) -> str:
    shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row" class="{escape(kind)}">{escape(name)}</th>{shown}</tr>'


def _retrieval(evaluation: Evaluation, task: str) -> str:
    """A heat map a model: rows depths, columns lengths; and some of the wrong answers."""
    maps = "".join(_heat_map(evaluation, task, model) for model in evaluation.models)
    wrong = [
        (model, cell, asked, wrote)
        for model in evaluation.models
        for cell in model.cells
        if cell.task == task
        for asked, wrote in cell.wrong
    ]
    shown = "".join(
        f"<tr><th>{escape(_named(model))}</th><td>{cell.length:,}</td><td>{cell.depth:g}</td><td>{escape(asked)}</td>"
        f"<td>{escape(repr(wrote))}</td></tr>"
        for model, cell, asked, wrote in wrong[:: max(1, len(wrong) // SHOWN_WRONG)][:SHOWN_WRONG]
    )
    details = (
        f"<details><summary>{len(wrong)} wrong answers, some of them</summary><div class='scroll'><table><thead><tr>"
        "<th>model</th><th>length</th><th>depth</th><th>asked for</th><th>written</th></tr></thead>"
        f"<tbody>{shown}</tbody></table></div></details>"
    )
    return (
        f"<section><h2>Retrieval: {escape(task)}</h2>"
        f'<p class="soft">{evaluation.settings.trials} questions a cell, decoded greedily, exact answers only. Depth '
        "0% is the start of the text.</p>"
        f'<div class="maps">{maps}</div>{details if wrong else ""}</section>'
    )


def _heat_map(evaluation: Evaluation, task: str, model: ModelScores) -> str:
    settings = evaluation.settings
    cells = {(cell.depth, cell.length): cell for cell in model.cells if cell.task == task}
    rows = []
    for depth in settings.depths:
        found = []
        for length in settings.lengths:
            cell = cells.get((depth, length))
            share = 0.0 if cell is None else cell.accuracy
            text = "-" if cell is None else f"{cell.correct}/{cell.trials}"
            deep = ' class="deep"' if share >= DEEP else ""
            found.append(f'<td{deep} style="--share:{share:.0%}">{text}</td>')
        rows.append(f'<tr><th scope="row">{depth:.0%}</th>{"".join(found)}</tr>')
    head = "".join(f'<th scope="col">{length:,}</th>' for length in settings.lengths)
    total = f", {model.accuracy(task):.0%} in all" if cells else ""
    return (
        f'<table class="heat"><caption>{escape(_named(model))}{total}</caption><thead><tr><th scope="col">depth</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _structure(evaluation: Evaluation) -> str:
    """The models' facts side by side, and the plans that made the last one."""
    models = evaluation.models
    names = list(dict.fromkeys(name for model in models for name in model.facts))
    rows = []
    for name in names:
        values = [model.facts.get(name, "-") for model in models]
        changed = ' class="changed"' if len(set(values)) > 1 else ""
        rows.append(f"<tr{changed}><th>{escape(name)}</th>{''.join(f'<td>{escape(v)}</td>' for v in values)}</tr>")
    head = "".join(f"<th>{escape(_named(model))}: {escape(model.name)}</th>" for model in models)
    plans = models[-1].plans
    shown = "".join(
        f"<h3>{'The plan' if len(plans) == 1 else f'Plan {number}'}</h3>"
        f"<pre><code>{escape(f'# plan.yaml{chr(10)}{dump_yaml(plan)}')}</code></pre>"
        for number, plan in enumerate(plans, 1)
    )
    return (
        '<section><h2>The structure</h2><div class="scroll"><table class="facts"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{shown or '<p class=soft>No plan of longattn is recorded in this model.</p>'}</section>"
    )


def _made(evaluation: Evaluation) -> str:
    models, machine = evaluation.models, evaluation.machine
    source, target = (model.name for model in models) if len(models) == 2 else ("SRC", "DST")
    change = f"{shlex.join(['longattn', 'extend', source, target])} --plan plan.yaml  # what the plan above does"
    commands = [*([change] if models[-1].plans else []), *dict.fromkeys(evaluation.commands)]
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    weights = "; ".join(f"{_named(model)} {model.weights}" for model in models)
    return (
        "<section><h2>How it was made</h2>"
        f"<pre><code>{escape(chr(10).join(commands))}</code></pre>"
        f'<p class="soft">Machine: {escape(facts)}.<br>Digests: weights {escape(weights)}; scored text '
        f"{escape(str(evaluation.text['pieces_digest']))}.</p></section>"
    )


def _named(model: ModelScores) -> str:
    return "the model" if model.role == "model" else model.role
