"""What follows a model's length: generation's limit, and the tokenizer's length, which is kept for `restore`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from longattn.report import Change

__all__ = ["TOKENIZER_LENGTH", "follow_length", "has_limit", "keep_tokenizer_length", "restore_tokenizer_length"]

TOKENIZER_LENGTH = "tokenizer.model_max_length"
KEPT = "original_tokenizer"
# transformers' stand-in for a tokenizer that has no limit
UNLIMITED = int(1e30)


def has_limit(length: float | None) -> bool:
    """Whether a tokenizer's `model_max_length` is a length, and not the stand-in for none."""
    return length is not None and length < UNLIMITED // 10


def follow_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, changes: list[Change]
) -> list[Change]:
    """Let generation's limit, where that was the model's length, and a tokenizer's follow it; gives what changed."""
    change = next((change for change in changes if change.what == "max_position_embeddings"), None)
    if change is None:
        return []
    followed = []
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.max_length == change.before:
        generation.max_length = change.after
        followed.append(Change("generation_config.max_length", change.before, change.after))
    if tokenizer is not None and has_limit(tokenizer.model_max_length):
        keep_tokenizer_length(model.config, tokenizer.model_max_length, change.before)
        before, tokenizer.model_max_length = tokenizer.model_max_length, change.after
        followed.append(Change(TOKENIZER_LENGTH, before, change.after))
    return followed


def keep_tokenizer_length(config: PreTrainedConfig, length: int | None, model_length: int) -> None:
    """Note in the record a tokenizer's length as it was before the first plan that changed it.

    Where earlier plans made the model longer and noted no tokenizer's length, one as long as the model may be their
    doing; then what it was before is not known, and nothing is noted.

    Args:
        config: with the record of the plan that changes the tokenizer.
        length: the tokenizer's before that, in tokens; None where it had no limit.
        model_length: the model's before that, in tokens.
    """
    record = config.longattn
    longer = record["original"].get("max_position_embeddings", model_length) != model_length
    if KEPT not in record and not (longer and length == model_length):
        config.longattn = {**record, KEPT: {"model_max_length": length}}


def restore_tokenizer_length(
    tokenizer: PreTrainedTokenizerBase | None, record: dict[str, Any]
) -> tuple[list[Change], list[str]]:
    """Put a tokenizer's length back as a record has it; gives what changed, and a note where there is no tokenizer."""
    if KEPT not in record:
        return [], []
    length = record[KEPT]["model_max_length"]
    if tokenizer is None:
        was = "no model_max_length" if length is None else f"model_max_length {length}"
        return [], [f"the tokenizer, which was not given, had {was} before the first plan"]
    before = tokenizer.model_max_length
    tokenizer.model_max_length = UNLIMITED if length is None else length
    return [Change(TOKENIZER_LENGTH, before if has_limit(before) else None, length)], []
