"""The model card of a new checkpoint: what longattn did, above the card of the checkpoint that it was made from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from longattn.hf.record import IMPLEMENTATION
from longattn.info import build_info
from longattn.plan import Plan
from longattn.plan_yaml import dump_yaml
from longattn.report import Report, in_runs
from longattn.structure import Structure, inspect_checkpoint
from longattn.units import format_bytes, format_flops

if TYPE_CHECKING:
    from longattn.vocab import TokenReport

__all__ = ["write_model_card", "write_training_card"]

CARD = "README.md"
BEGIN, END = "<!-- longattn: begin -->", "<!-- longattn: end -->"
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?\n)??---[ \t]*(?:\n|\Z)", re.DOTALL)
OURS = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}\n*", re.DOTALL)
SECTION = re.compile(r"^### (Plan|Training) \d+\n", re.MULTILINE)
# What a card says of the weights that were measured, which is not true of a changed model.
MEASURED = ("model-index",)
# What a plan records of initialisers that only Python can give.
MADE_IN_PYTHON = ("tensor", "callable")
IN_TRAINING = "attention in training"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


def write_model_card(
    folder: Path,
    source: str | os.PathLike[str],
    plan: Plan | None,
    report: Report,
    *,
    name: str,
    base_model: str | None,
) -> None:
    """Write the README.md of a checkpoint's folder that holds all its other files already, the old card among them.

    The old card's front matter stays, but for results that were measured on the old model. Where the old card has
    sections on earlier plans, the new plan's comes after them.

    Args:
        folder: the new checkpoint.
        source: the checkpoint that it was made from.
        plan: what was changed; None where the checkpoint was exported and nothing else.
        report: what the change said of itself.
        name: what the card calls the checkpoint.
        base_model: the Hub id that it was made from; None where that was a folder.

    Example:
        >>> write_model_card(folder, "Llama-2-7b", plan, report, name="Llama-2-7b-32k", base_model=None)
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    patterns = config.get("attn_implementation") == IMPLEMENTATION
    section = _plan_section(source, plan, report, patterns)
    _write(folder, "Plan", section, _loading(folder, patterns), name=name, base_model=base_model)


def write_training_card(
    folder: Path,
    what: Sequence[str],
    settings: dict[str, Any],
    loading: str | None,
    *,
    name: str,
    base_model: str | None,
) -> None:
    """Add what a training run did to the README.md of a folder that holds all its other files already.

    Args:
        folder: the new checkpoint, or the adapter.
        what: paragraphs on what was trained, how, and what was measured.
        settings: the run's keys.
        loading: the code that loads it, where `AutoModelForCausalLM` does not.
        name: as in `write_model_card`.
        base_model: as in `write_model_card`.

    Example:
        >>> write_training_card(folder, ["10 steps."], {"steps": 10}, name="tuned", base_model=None)
    """
    if loading is None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        loading = _loading(folder, config.get("attn_implementation") == IMPLEMENTATION)
    section = "\n\n".join([*what, _fenced(dump_yaml(settings), "yaml"), _versions()])
    _write(folder, "Training", section, loading, name=name, base_model=base_model)


def _write(folder: Path, kind: str, section: str, loading: str, *, name: str, base_model: str | None) -> None:
    """Put a section of a kind after those of earlier plans and training runs, above the old card."""
    path = folder / CARD
    # what is no UTF-8 comes back byte by byte
    old = path.read_text(encoding="utf-8-sig", errors="surrogateescape") if path.is_file() else ""
    front, body = _split(old)
    sections = [section for ours in OURS.findall(body) for section in _sections(ours)]
    body = OURS.sub("", body).strip("\n")
    number = sum(earlier.startswith(f"### {kind} ") for earlier in sections) + 1
    sections.append(f"### {kind} {number}\n\n{section}")
    origin = "a checkpoint on disk" if base_model is None else f"[{base_model}](https://huggingface.co/{base_model})"
    trained = any(earlier.startswith("### Training ") for earlier in sections)
    weights = (
        "Weights were trained, as it says there."
        if trained
        else "No weight was trained for it: all tensors are those of that checkpoint, but for the rows of new tokens."
    )
    parts = [
        f"---\n{_front_matter(front, base_model)}---\n\n{BEGIN}",
        f"# {name}",
        f"Made from {origin} with longattn, in {_times(len(sections))}. {weights}"
        f"{' Its card follows below.' if body else ''}",
        f"### Load\n\n{_fenced(loading, 'python')}",
        *sections,
        END,
        *([body] if body else []),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8", errors="surrogateescape")


def _split(card: str) -> tuple[str, str]:
    """The front matter's YAML, and what comes after it; all is the latter where there is no mapping in front."""
    match = FRONT_MATTER.match(card)
    if match is None:
        return "", card
    try:
        root = yaml.compose(match[1] or "", Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return "", card
    if root is None:
        return "", card[match.end() :]
    return (match[1], card[match.end() :]) if isinstance(root, yaml.MappingNode) else ("", card)


def _sections(ours: str) -> list[str]:
    starts = [match.start() for match in SECTION.finditer(ours)]
    ends = [*starts[1:], ours.index(END)]
    return [ours[start:end].strip("\n") for start, end in zip(starts, ends, strict=True)] if starts else []


def _front_matter(stored: str, base_model: str | None) -> str:
    """The stored front matter with longattn's entries at its end; all other entries stay as they are written."""
    root = yaml.compose(stored, Loader=yaml.SafeLoader) if stored else None
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    if isinstance(root, yaml.MappingNode) and pairs and root.flow_style:
        return _front_matter(dump_yaml(yaml.safe_load(stored)), base_model)
    values = {key.value: value for key, value in pairs}
    entries: dict[str, Any] = {"library_name": "transformers", "tags": _tags(values.get("tags"))}
    dropped = [*MEASURED, *entries]
    if base_model is not None:
        entries["base_model"] = base_model
        dropped += ["base_model", "base_model_relation"]
    starts = [key.start_mark.index for key, _ in pairs]
    ends = [*starts, len(stored)][1:]
    kept = [stored[a:b] for a, b, (key, _) in zip(starts, ends, pairs, strict=True) if key.value not in dropped]
    return (stored[: starts[0]] if starts else "") + "".join(kept) + dump_yaml(entries)


def _tags(stored: yaml.Node | None) -> list[str]:
    nodes = stored.value if isinstance(stored, yaml.SequenceNode) else [] if stored is None else [stored]
    tags = [node.value for node in nodes if isinstance(node, yaml.ScalarNode) and node.value]
    return tags if "longattn" in tags else [*tags, "longattn"]


def _times(steps: int) -> str:
    return "one step" if steps == 1 else f"{steps} steps, oldest first"


def _loading(folder: Path, patterns: bool) -> str:
    """Code that loads the checkpoint from within its folder, with longattn where that has its patterns."""
    tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    lines = ["import longattn  # registers the attention that config.json names"] if patterns else []
    lines += ["from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if tokenizer else ""), ""]
    lines += ['checkpoint = "."  # this folder, or the model\'s id on the Hub']
    lines += ["model = AutoModelForCausalLM.from_pretrained(checkpoint)"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(checkpoint)"] if tokenizer else []
    return "\n".join(lines) + "\n"


def _plan_section(source: str | os.PathLike[str], plan: Plan | None, report: Report, patterns: bool) -> str:
    parts = ["No plan: exported as it is."] if plan is None else _planned(source, plan, patterns)
    if report.tokens is not None:
        parts += _tokens(report.tokens)
    for heading, lines in (("Checked when it was made:", report.proofs), ("Notes:", report.notes)):
        if lines:
            parts.append("\n".join([heading, "", *(f"- {line}" for line in lines)]))
    return "\n\n".join([*parts, _versions()])


def _versions() -> str:
    info = build_info()
    return f"Versions: {', '.join(f'{package} {info[package]}' for package in ('longattn', 'transformers', 'torch'))}."


def _planned(source: str | os.PathLike[str], plan: Plan, patterns: bool) -> list[str]:
    """The plan, and what it makes of the structure; of patterns in training only where longattn serves them."""
    stored = plan.to_dict()
    parts = [_fenced(dump_yaml(stored), "yaml")]
    given = {word for key in ("init", "output_init") if (word := stored.get("tokens", {}).get(key)) in MADE_IN_PYTHON}
    if given:
        parts.append(f"What Python code gave stands in it as {' and '.join(sorted(given))}, and is not kept.")
    if all(value is None for value in (plan.rope, plan.context, plan.attention, plan.train_attention)):
        return [*parts, "Layers, rotary embedding and length are as they were."]
    before, after = inspect_checkpoint(source, plan=plan)
    assert after is not None
    rows = [row for row in _rows(before, after) if patterns or row[0] != IN_TRAINING]
    return [*parts, _table([(f"one text of {after.context:,} tokens", "before", "after"), *rows])]


def _rows(before: Structure, after: Structure) -> list[tuple[str, str, str]]:
    both = (before, after)
    rows = {
        "positions": [f"{s.max_position_embeddings:,}" for s in both],
        "attention": [_by_layer([layer.attention for layer in s.layers]) for s in both],
        IN_TRAINING: [_by_layer([layer.train_attention for layer in s.layers]) for s in both],
        "rotary embedding": [_by_layer([layer.rope_type for layer in s.layers]) for s in both],
        "wavelengths, tokens": [_by_layer([_wavelengths(layer.wavelengths) for layer in s.layers]) for s in both],
        "KV cache": [format_bytes(s.costs.kv_cache_bytes) for s in both],
        "attention, whole text": [format_flops(s.costs.prefill_flops) for s in both],
        "attention, last token": [format_flops(s.costs.decode_flops) for s in both],
    }
    return [(what, old, new) for what, (old, new) in rows.items()]


def _by_layer(entries: Sequence[str]) -> str:
    """What the layers have, written as a plan writes it: the shortest cycle that gives it."""
    length = next(n for n in range(1, len(entries) + 1) if all(e == entries[i % n] for i, e in enumerate(entries)))
    if length == 1:
        return entries[0]
    return in_runs(entries[:length]) + ("" if length == len(entries) else f", cycled over {len(entries)} layers")


def _wavelengths(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3g} to {ends[1]:,.0f}"


def _tokens(report: TokenReport) -> list[str]:
    roles = {token: role for role, token in report.roles.items()}
    rows = [("id", "new token", "role", "input row", "output row")]
    for token, new in report.ids.items():
        output = "none" if report.output_rows is None else "the same" if report.tied else report.output_rows[token]
        rows.append((str(new), _code(token), roles.get(token, ""), report.input_rows[token], output))
    (old_size, new_size), (old_rows, new_rows) = report.tokenizer_size, report.rows
    sizes = f"Tokenizer: {old_size:,} tokens before, {new_size:,} after. Embeddings: {old_rows:,} rows before, "
    sizes += f"{new_rows:,} after."
    if report.padding_rows:
        sizes += f" Rows {report.padding_rows[0]} to {report.padding_rows[-1]} are padding, set to the mean."
    return [_table(rows), sizes]


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _code(text: str) -> str:
    """A code span, whatever the text."""
    ticks = "`" * (_longest_run(text, "`") + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fenced(code: str, language: str) -> str:
    fence = "`" * max(3, _longest_run(code, "`") + 1)
    return f"{fence}{language}\n{code}{fence}"


def _longest_run(text: str, character: str) -> int:
    return max((len(list(run)) for found, run in groupby(text) if found == character), default=0)
