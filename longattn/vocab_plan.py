"""Carrying out what was prepared for new tokens, undoing it, and reporting it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longattn.vocab_init import OldRows, RowRule
from longattn.vocab_matrix import Matrices, ModelState, Part, find_matrices, follow_config, grow
from longattn.vocab_tokens import NewToken, add_to, replace_contents, role_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["NewRows", "TokenPlan", "TokenReport", "make_rows", "token_fields"]

# roles whose ids every config has, as generation reads them
GENERATION_ROLES = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class TokenReport:
    """What `add_tokens` did.

    Args:
        ids: the id of each new token, in the order given.
        roles: the token that each role was given.
        special: whether the tokens are special ones.
        tokenizer_size: tokens in the tokenizer, before and after.
        rows: rows of the embedding matrices, before and after.
        tied: whether input and output embeddings are one matrix; None without output embeddings.
        input_rows: how each token's row of the input embedding was set.
        output_rows: how each token's row of the output embedding was set; as `input_rows` where tied, None where there
            is none.
        padding_rows: the new rows that no token has, set to the mean of the old ones.
    """

    ids: dict[str, int]
    roles: dict[str, str]
    special: bool
    tokenizer_size: tuple[int, int]
    rows: tuple[int, int]
    tied: bool | None
    input_rows: dict[str, str]
    output_rows: dict[str, str] | None
    padding_rows: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Give the report as a JSON-able dict."""
        return {**vars(self), "tokenizer_size": list(self.tokenizer_size), "rows": list(self.rows)}

    def __str__(self) -> str:
        roles = {token: role for role, token in self.roles.items()}
        table = [("id", "token", "role", "input row", "output row")]
        for token, new in self.ids.items():
            output = "-" if self.output_rows is None else "tied" if self.tied else self.output_rows[token]
            table.append((str(new), repr(token), roles.get(token, "-"), self.input_rows[token], output))
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in table]
        (old_size, new_size), (old_rows, new_rows) = self.tokenizer_size, self.rows
        lines.append(f"tokenizer {old_size} -> {new_size} tokens, embeddings {old_rows} -> {new_rows} rows")
        if self.padding_rows:
            lines.append(f"padding rows {self.padding_rows[0]} to {self.padding_rows[-1]}: mean")
        return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True)
class NewRows:
    """The rows that a matrix gets: those of the tokens, then those that only pad it."""

    part: Part
    rows: Tensor  # (tokens + padding, hidden)
    biases: Tensor | None  # (tokens + padding,)


def make_rows(part: Part, old_ids: Sequence[int], rules: Mapping[str, RowRule], padding: int) -> NewRows:
    """Make the new rows of one matrix of its old ones, by each token's rule."""
    old = OldRows(part.name, part.weight, part.bias, old_ids)
    rows, biases = old.make(rules)
    pad_rows, pad_biases = old.padding(padding)
    if biases is None or pad_biases is None:
        return NewRows(part, torch.cat([rows, pad_rows]), None)
    return NewRows(part, torch.cat([rows, pad_rows]), torch.cat([biases, pad_biases]))


class TokenPlan:
    """New tokens that were checked and whose rows are known; `apply` adds them, `undo` takes them away again.

    Args:
        model, tokenizer, tokens, matrices: what changes, and by what.
        new_rows: what each matrix gets.
        report: what `apply` will have done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Sequence[NewToken],
        matrices: Matrices,
        new_rows: Sequence[NewRows],
        report: TokenReport,
    ) -> None:
        self.model, self.tokenizer, self.report = model, tokenizer, report
        self._tokens, self._matrices, self._new_rows = tokens, matrices, new_rows
        self._before: tuple[ModelState, PreTrainedTokenizerBase] | None = None

    def apply(self) -> TokenReport:
        """Add the tokens; on any error model and tokenizer are as they were.

        Returns:
            The report.

        Raises:
            RuntimeError: model or tokenizer changed since they were looked at, or a change did not take effect.
        """
        report = self.report
        matrices = find_matrices(self.model)
        if matrices != self._matrices or matrices.rows != report.rows[0]:
            raise RuntimeError("add_tokens: the model's embeddings were changed since prepare_tokens looked at them")
        if len(self.tokenizer) != report.tokenizer_size[0]:
            raise RuntimeError("add_tokens: the tokenizer was changed since prepare_tokens looked at it")
        state = ModelState(self.model, matrices, list(report.ids.values()))
        self._before = state, copy.deepcopy(self.tokenizer)
        try:
            # what inference mode makes can never be trained, so rows are made in the mode of the matrices themselves
            with torch.inference_mode(matrices.input.weight.is_inference()):
                self._apply(matrices)
        except BaseException:
            self.undo()
            raise
        return report

    def _apply(self, matrices: Matrices) -> None:
        report = self.report
        old_pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        if report.rows[1] > report.rows[0]:
            grow(self.model, matrices, report.rows[1])
        for new in self._new_rows:
            new.part.write([*report.ids.values(), *report.padding_rows], new.rows, new.biases)
        old_roles = role_ids(self.tokenizer, list(report.roles))
        add_to(self.tokenizer, self._tokens)
        if self.tokenizer.convert_tokens_to_ids(list(report.ids)) != list(report.ids.values()):
            raise RuntimeError("add_tokens: the tokenizer gave other ids than its copy did")
        for role, text in report.roles.items():
            _set_role_id(self.model, role, old_roles.get(role), report.ids[text])
        follow_config(self.model, matrices, report.rows[0], old_pad)

    def undo(self) -> None:
        """Put model and tokenizer back as they were when `apply` was called; undo what came after it first.

        Raises:
            RuntimeError: there is nothing to undo.
        """
        if self._before is None:
            raise RuntimeError("add_tokens: nothing was applied that could be undone")
        state, tokenizer = self._before
        self._before = None
        with torch.inference_mode(self._matrices.input.weight.is_inference()):
            state.restore()
        replace_contents(self.tokenizer, tokenizer)


def token_fields(model: PreTrainedModel, roles: Iterable[str]) -> dict[str, Any]:
    """What a model's configs say of its vocabulary: the size, and the ids of the tokens with these roles."""
    generation = getattr(model, "generation_config", None)
    fields = {"vocab_size": model.config.vocab_size}
    for name in (f"{role}_id" for role in roles):
        fields[name] = getattr(model.config, name, None)
        fields[f"generation_config.{name}"] = getattr(generation, name, None)
    return fields


def _set_role_id(model: PreTrainedModel, role: str, old: int | None, new: int) -> None:
    """Write the id of a role's token into the configs; where they list several ids, it takes the old one's place."""
    name = f"{role}_id"
    configs = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    for config in {id(config): config for config in configs if config is not None}.values():
        current = getattr(config, name, None)
        if isinstance(current, list):
            kept = [new if known == old else known for known in current]
            setattr(config, name, kept if new in kept else [*kept, new])
        elif role in GENERATION_ROLES or hasattr(config, name):
            setattr(config, name, new)
