"""A whole evaluation of one model, or of one before and after a change: loads, measures, saves after every piece."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

import longattn.hf  # noqa: F401  (checkpoints whose attention was changed ask transformers for it)
from longattn.checkpoint_source import knows_no_text
from longattn.evaluate.perplexity import score_last, score_sliding
from longattn.evaluate.results import (
    Evaluation,
    ModelScores,
    Settings,
    known_scores,
    read_evaluation,
    write_evaluation,
)
from longattn.evaluate.retrieval import Cell, evaluate_retrieval, least_length
from longattn.evaluate.tasks import TASKS
from longattn.evaluate.windows import (
    ScoringWindow,
    encode,
    first_token,
    leading_tokens,
    spread_ends,
    windows_at,
)
from longattn.hf.record import layer_patterns, read_record
from longattn.report import in_runs
from longattn.text import Document

__all__ = ["Progress", "evaluate", "work_of"]

Progress = Callable[[str, int], None]
SAMPLED = 4096  # numbers of a tensor that its digest reads one by one
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLE_CHARS = 20_000


def work_of(settings: Settings, models: int) -> int:
    """Tokens that an evaluation reads, about; what `evaluate` reports to its `progress` in all."""
    questions = len(settings.tasks) * len(settings.depths) * settings.trials
    return models * sum(settings.lengths) * (settings.windows + settings.sliding_windows + questions)


def evaluate(
    models: Sequence[tuple[str, str]],
    documents: Sequence[Document],
    settings: Settings,
    *,
    text_name: str,
    saved: Path | None = None,
    device: str = "cpu",
    command: str = "",
    progress: Progress = lambda doing, tokens: None,
) -> Evaluation:
    """Measure one model, or one before and one after a change, on the same pieces of text and the same questions.

    Args:
        models: role ("model", or "before" and then "after") and folder or Hub id of each.
        documents: texts that no model was trained on.
        settings: what to measure.
        text_name: what reports call the text.
        saved: JSON, written after every piece; where it is there already, what it holds is not measured again.
        device: to compute on.
        command: that this run was started by, for the report.
        progress: called with what was done and its tokens, of `work_of` in all.

    Raises:
        ValueError: the text is too short for the longest length, or `saved` holds another evaluation.

    Example:
        >>> models = [("before", "Llama-2-7b"), ("after", "Llama-2-7b-32k")]
        >>> evaluate(models, documents, Settings([4096, 32768]), text_name="books", saved=Path("scores.json"))
    """
    tokenizers = [_tokenizer(name) for _, name in models]
    _check_questions_fit(tokenizers, settings)
    pieces, left_out = _pieces(documents, tokenizers, settings)
    text = {
        "name": text_name,
        "documents": len(documents),
        "characters": sum(len(doc.text) for doc in documents),
        "pieces": len(pieces[0]),
        "pieces_left_out": left_out,
        "pieces_digest": _digest_of([window for windows in pieces for window in windows]),
    }
    evaluation = Evaluation(settings, text, [ModelScores(name, role) for role, name in models])
    earlier: list[ModelScores] = []
    kept = settings
    if saved is not None and saved.exists():
        found = read_evaluation(saved)
        earlier, evaluation.commands = known_scores(found, evaluation, saved), found.commands
        # how many sliding windows those have that stay in the file
        kept = replace(settings, sliding_windows=settings.sliding_windows or found.settings.sliding_windows)
    evaluation.commands = [*evaluation.commands, *([command] if command else [])]
    evaluation.machine = _machine()
    by_role = {scores.role: scores for scores in earlier}
    olds = [by_role.get(scores.role, ModelScores(scores.name, scores.role)) for scores in evaluation.models]

    def save() -> None:
        """Write what was measured, and what the file holds beyond it: this run may be stopped, or asked for less."""
        if saved is not None:
            both = zip(evaluation.models, olds, strict=True)
            models = [new.with_rest_of(old) for new, old in both]
            write_evaluation(replace(evaluation, settings=kept, models=models), saved)

    for scores, old, tokenizer, windows in zip(evaluation.models, olds, tokenizers, pieces, strict=True):
        model: Any = AutoModelForCausalLM.from_pretrained(scores.name, dtype=settings.dtype)
        model = model.to(device).eval()
        _describe(scores, model)
        if old.weights not in ("", scores.weights):
            raise ValueError(f"eval: --json {saved} was measured on other weights of {scores.name}; give another file")
        for doing, tokens in _measure(scores, old, model, tokenizer, windows, documents, settings):
            progress(doing, tokens)
            save()
        del model
    evaluation.complete = True
    save()
    return evaluation


def _tokenizer(name: str) -> Any:
    """A model's tokenizer, which is not to warn of long texts."""
    found, cause = None, None
    try:
        found = AutoTokenizer.from_pretrained(name, model_max_length=1 << 62)
    except (OSError, ValueError) as error:
        cause = error
    if found is None or knows_no_text(found):
        raise ValueError(
            f"eval: model {name} must be a checkpoint's folder with a tokenizer, or a model's id that can be fetched"
        ) from cause
    return found


def _check_questions_fit(tokenizers: Sequence[Any], settings: Settings) -> None:
    """Refuse lengths that are too short for a question, before anything is measured and for all tasks at once."""
    length, depths, trials = settings.lengths[0], settings.depths, settings.trials
    least = {
        task: least_length(TASKS[task], tokenizers, length, depths=depths, trials=trials, seed=settings.seed)
        for task in settings.tasks
    }
    short = [f"{tokens} for {task}" for task, tokens in least.items() if tokens > length]
    if short:
        raise ValueError(
            f"eval: lengths must be at least as many tokens as the questions take, {', '.join(short)}, with the "
            f"tokenizers of these models, got {length}"
        )


def _measure(
    scores: ModelScores,
    old: ModelScores,
    model: PreTrainedModel,
    tokenizer: Any,
    windows: list[ScoringWindow],
    documents: Sequence[Document],
    settings: Settings,
) -> Iterator[tuple[str, int]]:
    """Fill in what is missing, and say after each piece what it was and how many tokens that read."""
    label = scores.role if scores.role != "model" else scores.name
    for length in settings.lengths:
        scores.last.append(old.score(length) or score_last(model, windows, length))
        yield f"{label}: the same last tokens, {length:,} in sight", length * settings.windows
    if settings.sliding_windows:
        first = first_token(tokenizer)
        longest = settings.lengths[-1] + (settings.sliding_windows - 1) * settings.stride
        scored = {window.name for window in windows}
        texts = leading_tokens([doc for doc in documents if doc.name in scored], tokenizer, longest)
        for length in settings.lengths:
            slid = old.slid(length)
            if slid is None:
                slid = score_sliding(
                    model,
                    texts,
                    length,
                    stride=min(settings.stride, length - 1),
                    max_windows=settings.sliding_windows,
                    first=first,
                )
            scores.sliding.append(slid)
            yield f"{label}: sliding windows of {length:,}", length * settings.sliding_windows
    for task in settings.tasks:
        for length in settings.lengths:
            for depth in settings.depths:
                scores.cells += _cells(model, tokenizer, task, length, depth, settings, old.cells)
                yield f"{label}: {task} in {length:,} tokens at depth {depth:g}", length * settings.trials


def _cells(
    model: PreTrainedModel,
    tokenizer: Any,
    task: str,
    length: int,
    depth: float,
    settings: Settings,
    known: list[Cell],
) -> list[Cell]:
    return evaluate_retrieval(
        model,
        tokenizer,
        [TASKS[task]],
        [length],
        depths=[depth],
        trials=settings.trials,
        seed=settings.seed,
        known=known,
    )


def _pieces(
    documents: Sequence[Document], tokenizers: Sequence[Any], settings: Settings
) -> tuple[list[list[ScoringWindow]], int]:
    """Each tokenizer's windows, which end at the same characters, and how many ends gave none that fits all lengths."""
    longest, tokenizer = settings.lengths[-1], tokenizers[-1]
    sample = " ".join(doc.text[:SAMPLE_CHARS] for doc in documents[:8])[:SAMPLE_CHARS]
    target_chars = max(1, round(settings.last * len(sample) / max(1, len(encode(tokenizer, sample)))))
    ends = spread_ends(documents, tokenizer, count=settings.windows, longest=longest, target_chars=target_chars)
    cut = [list(windows_at(ends, each, longest=longest, target_chars=target_chars)) for each in tokenizers]
    kept = [windows for windows in zip(*cut, strict=True) if None not in windows]
    fitting = [windows for windows in kept if all(_fits(window, settings) for window in windows)]
    if kept and not fitting:
        most = max(window.num_targets + (window.first is not None) for windows in kept for window in windows)
        raise ValueError(
            f"eval: lengths must hold all that is scored, got {settings.lengths[0]} tokens where the last "
            f"{settings.last}, on average, are {most} in this text; score fewer (--last)"
        )
    if not fitting:
        raise ValueError(_too_short(documents, tokenizer, longest))
    return [list(windows) for windows in zip(*fitting, strict=True)], len(ends) - len(fitting)


def _fits(window: ScoringWindow | None, settings: Settings) -> bool:
    """Whether the shortest length holds the window's scored tokens, of which some text has more than the mean."""
    return window is not None and window.num_targets + (window.first is not None) < settings.lengths[0]


def _too_short(documents: Sequence[Document], tokenizer: Any, longest: int) -> str:
    longest_text = max(documents, key=lambda doc: len(doc.text))
    (ids,) = leading_tokens([longest_text], tokenizer, longest)
    together = sum(len(doc.text) for doc in documents) / max(1, len(longest_text.text)) * len(ids)
    hint = "; --join makes one text of all" if len(documents) > 1 and together > longest else ""
    return (
        f"eval: --text must hold one text of at least {longest:,} tokens, the longest of --lengths, got "
        f"{len(ids):,} in the longest of {len(documents)} ({longest_text.name}): give longer texts or shorter "
        f"lengths{hint}"
    )


def _describe(scores: ModelScores, model: Any) -> None:
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    record = read_record(config)
    if record is not None:
        scores.plans = [*record.get("earlier_plans", []), record["plan"]]
    rope = getattr(config, "rope_parameters", None) or {}
    served, trained = layer_patterns(config), layer_patterns(config, "train_attention")
    scores.facts = {
        "family": config.model_type,
        "parameters": f"{model.num_parameters():,}",
        "length": f"{getattr(config, 'max_position_embeddings', '-')}",
        "rope": ", ".join(f"{name} {value}" for name, value in rope.items()) or "none",
        "attention": in_runs([str(one) for one in served]) if served else "the model's own",
        "attention in training": in_runs([str(one) for one in trained]) if trained else "as served",
        "rows of the vocabulary": f"{model.get_input_embeddings().weight.shape[0]:,}",
        "computed in": str(model.dtype).removeprefix("torch."),
    }
    fields = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED)].double().cpu()
        # all numbers, too, as integers, whose sum no order of adding changes: a few rows may be all that was trained
        total = int(flat.view(INTEGERS[flat.element_size()]).sum(dtype=torch.int64))
        digest.update(f"{name}{tuple(parameter.shape)}{total}".encode() + sample.numpy().tobytes())
    scores.weights = digest.hexdigest()[:16]


def _digest_of(windows: Sequence[ScoringWindow]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(repr((window.name, window.ids, window.num_targets, window.first)).encode())
    return digest.hexdigest()[:16]


def _machine() -> dict[str, Any]:
    from longattn.bench.machine import machine_facts

    return machine_facts()
