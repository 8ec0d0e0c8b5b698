"""How the rows of new tokens are made from the rows a matrix has; changes when an initialiser does."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longattn.vocab_tokens import existing_id, old_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Init", "NOISE", "OldRows", "RowRule", "describe", "read_init"]

Init = str | Mapping[str, str] | Tensor | Callable[[str, Tensor], Tensor]
NOISE = 0.02
"""The noise on a mean row, in standard deviations of each channel over the old rows."""

MAX_DOUBLINGS = 8
CHUNK_ROWS = 8192


@dataclass(frozen=True)
class RowRule:
    """How one row is made: a mean of old rows, a given row, or a function; the mean of all where none is set."""

    how: str
    ids: tuple[int, ...] = ()
    row: Tensor | None = None  # (hidden,)
    function: Callable[[str, Tensor], Tensor] | None = None

    @property
    def is_mean(self) -> bool:
        return not self.ids and self.row is None and self.function is None


def describe(init: Init) -> str:
    """An initialiser in a word, for messages."""
    return f"a tensor {tuple(init.shape)}" if isinstance(init, Tensor) else repr(init)


def read_init(
    name: str, init: Init, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, hidden: int
) -> dict[str, RowRule]:
    """Read `init` or `output_init` (`name`) for tokens that the tokenizer does not have yet: a rule for each."""
    return dict(zip(texts, _rules(name, init, texts, tokenizer, hidden), strict=True))


def _rules(
    name: str, init: Init, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, hidden: int
) -> list[RowRule]:
    if isinstance(init, Tensor):
        return _read_tensor(name, init, len(texts), hidden)
    if isinstance(init, Mapping):
        return _read_descriptions(name, init, texts, tokenizer)
    if callable(init):
        return [RowRule(f"by {getattr(init, '__name__', type(init).__name__)}", function=init) for _ in texts]
    if not isinstance(init, str):
        raise TypeError(
            f"add_tokens: {name} must be a text, a mapping from token to description, a tensor or a callable, "
            f"got {init!r}"
        )
    if init == "mean":
        return [RowRule("mean")] * len(texts)
    if init == "subwords":
        return [_pieces_rule(name, "subwords", text, text, tokenizer) for text in texts]
    if init.startswith("copy:"):
        source = init.removeprefix("copy:")
        old = existing_id(tokenizer, source, tokenizer.get_vocab())
        if old is None:
            raise ValueError(f"add_tokens: {name} must copy a token that the tokenizer has, got {source!r}")
        return [RowRule(f"copy of {source!r} ({old})", ids=(old,))] * len(texts)
    raise ValueError(
        f"add_tokens: {name} must be 'mean', 'subwords', 'copy:<token>', a mapping from token to description, a tensor "
        f"or a callable, got {init!r}"
    )


def _read_tensor(name: str, rows: Tensor, count: int, hidden: int) -> list[RowRule]:
    if not rows.is_floating_point() or rows.is_meta:
        raise TypeError(f"add_tokens: {name} must be a tensor of real numbers, got {rows.dtype} on {rows.device}")
    if tuple(rows.shape) != (count, hidden):
        raise ValueError(
            f"add_tokens: {name} must have shape {(count, hidden)}, a row for each token, got {tuple(rows.shape)}"
        )
    return [RowRule("given", row=row) for row in rows.detach().clone()]


def _read_descriptions(
    name: str, descriptions: Mapping[str, str], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[RowRule]:
    missing = [text for text in texts if text not in descriptions]
    if missing:
        raise ValueError(f"add_tokens: {name} must describe every token, got no description of {missing[0]!r}")
    unknown = [text for text in descriptions if text not in texts]
    if unknown:
        raise ValueError(f"add_tokens: {name} must describe only tokens that are added, got {unknown[0]!r}")
    for text, description in descriptions.items():
        if not isinstance(description, str):
            raise TypeError(f"add_tokens: {name}[{text!r}] must be a text, got {description!r}")
    return [_pieces_rule(name, "description", text, descriptions[text], tokenizer) for text in texts]


def _pieces_rule(name: str, kind: str, text: str, source: str, tokenizer: PreTrainedTokenizerBase) -> RowRule:
    ids = tuple(old_pieces(tokenizer, source))
    if not ids:
        raise ValueError(f"add_tokens: {name} must find old tokens in the {kind} of {text!r}, got none in {source!r}")
    return RowRule(f"mean of {len(ids)} {'piece' if len(ids) == 1 else 'pieces'} of {source!r}", ids=ids)


class OldRows:
    """The rows of a matrix that tokens have, and the new rows that rules make of them.

    Statistics are formed on the CPU in float64, chunk by chunk, so they depend neither on the device nor on the dtype.
    A row counts if a token has it (rows that pad the matrix don't) and not all of it is zero (reserved, never trained).

    Args:
        name: the matrix, "input" or "output"; seeds the noise.
        weight: (rows, hidden), the matrix.
        bias: (rows,) or None; set by the same rules, to its own mean where a rule says nothing about it.
        token_ids: the ids of all old tokens.
    """

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None, token_ids: Sequence[int]) -> None:
        self.name = name
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self._has_token = torch.zeros(weight.shape[0], dtype=torch.bool)
        self._has_token[torch.tensor(token_ids, dtype=torch.long)] = True

    @functools.cached_property
    def _statistics(self) -> tuple[Tensor, Tensor, float]:
        """Mean (hidden,) and standard deviation (hidden,) of the rows, and the mean of the bias."""
        hidden = self.weight.shape[1]
        total = torch.zeros(hidden, dtype=torch.float64)
        squares = torch.zeros(hidden, dtype=torch.float64)
        bias_total, count = 0.0, 0
        for start in range(0, self.weight.shape[0], CHUNK_ROWS):
            here = slice(start, start + CHUNK_ROWS)
            chunk = self.weight[here].to("cpu", torch.float64)  # (rows here, hidden)
            counted = self._has_token[here] & (chunk != 0).any(dim=1)  # (rows here,)
            chunk = chunk[counted]
            total += chunk.sum(0)
            squares += chunk.square().sum(0)
            count += len(chunk)
            if self.bias is not None:
                bias_total += float(self.bias[here].to("cpu", torch.float64)[counted].sum())
        mean = total / max(count, 1)
        return mean, (squares / max(count, 1) - mean.square()).clamp_min(0).sqrt(), bias_total / max(count, 1)

    def make(self, rules: Mapping[str, RowRule]) -> tuple[Tensor, Tensor | None]:
        """The rows (n, hidden) and biases (n,) of new tokens, in the matrix's dtype, on the CPU."""
        rows: list[Tensor] = []
        biases: list[float] = []
        old = None
        for text, rule in rules.items():
            if rule.function is not None:
                # a function that writes into what it is given must not change the model
                old = self.weight.clone() if old is None else old
                rows.append(self._checked(text, rule.function(text, old)))
            elif rule.row is not None:
                rows.append(rule.row.to("cpu", torch.float64))
            else:
                rows.append(self._average(rule.ids))
            if self.bias is not None:
                biases.append(self._average_bias(self.bias, rule.ids))
        made = torch.stack(rows).to(self.weight.dtype)  # (n, hidden)
        texts = list(rules)
        means = [i for i, rule in enumerate(rules.values()) if rule.is_mean]
        if means:
            made[means] = self._distinct_means([texts[i] for i in means])
        bad = (~made.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"add_tokens: init must give {self.name} rows that are finite in {self.weight.dtype}, got other values "
                f"for {texts[bad[0]]!r}: {rules[texts[bad[0]]].how}"
            )
        return made, None if self.bias is None else torch.tensor(biases, dtype=torch.float64).to(self.bias.dtype)

    def padding(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Rows (count, hidden) and biases (count,) that no token has: the mean as it is."""
        if count == 0:
            return self.weight[:0].cpu(), None if self.bias is None else self.bias[:0].cpu()
        mean, _, mean_bias = self._statistics
        rows = mean.to(self.weight.dtype).repeat(count, 1)
        return rows, None if self.bias is None else torch.full((count,), mean_bias, dtype=self.bias.dtype)

    def _average(self, ids: Sequence[int]) -> Tensor:
        if not ids:
            return self._statistics[0]
        return self.weight[torch.tensor(ids, device=self.weight.device)].to("cpu", torch.float64).mean(0)  # (hidden,)

    def _average_bias(self, bias: Tensor, ids: Sequence[int]) -> float:
        if not ids:
            return self._statistics[2]
        return float(bias[torch.tensor(ids, device=bias.device)].to("cpu", torch.float64).mean())

    def _distinct_means(self, texts: Sequence[str]) -> Tensor:
        """Mean rows with noise, doubled until they all differ in the matrix's dtype: (n, hidden)."""
        mean, std, _ = self._statistics
        noise = torch.stack([_noise(f"{self.name} {text}", len(mean)) for text in texts]) * std  # (n, hidden)
        for doubling in range(MAX_DOUBLINGS + 1):
            rows = (mean + NOISE * 2**doubling * noise).to(self.weight.dtype)
            if len(rows.unique(dim=0)) == len(rows):
                break
        return rows

    def _checked(self, text: str, row: object) -> Tensor:
        hidden = self.weight.shape[1]
        if not isinstance(row, Tensor) or not row.is_floating_point():
            raise TypeError(
                f"add_tokens: init must return a floating-point tensor for {self.name} rows, got {row!r} for {text!r}"
            )
        if tuple(row.shape) != (hidden,):
            raise ValueError(
                f"add_tokens: init must return {self.name} rows of shape {(hidden,)}, "
                f"got {tuple(row.shape)} for {text!r}"
            )
        return row.detach().to("cpu", torch.float64)


def _noise(seed: str, size: int) -> Tensor:
    """Standard normal numbers (size,) that depend on a text alone, not on torch's own generator."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    return torch.randn(size, generator=generator, dtype=torch.float64)
