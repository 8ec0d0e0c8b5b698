"""Adding tokens to a model and its tokenizer: what is public, and the order in which things change."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from longattn.vocab_init import Init, RowRule, describe, read_init
from longattn.vocab_matrix import Matrices, find_matrices
from longattn.vocab_plan import TokenPlan, TokenReport, make_rows
from longattn.vocab_tokens import existing_id, new_tokens, stage
from longattn.wrappers import check_model

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Init", "TokenPlan", "TokenReport", "add_tokens", "prepare_tokens"]

MAX_MULTIPLE = 2**16  # no kernel wants rows in larger units, and each of the rows that this adds is made


def add_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str | AddedToken] | Mapping[str, object],
    *,
    special: bool = True,
    init: Init = "mean",
    output_init: Init | None = None,
    pad_to_multiple_of: int | None = None,
) -> TokenReport:
    """Add tokens to a tokenizer and set their rows in a model's embeddings, all of it or nothing.

    A row is set to the mean of old rows e_j: `e_new = sum_j e_j / n`, over all old tokens ("mean"), over the pieces
    that the tokenizer cut the token into so far ("subwords"), or over the pieces of a description. Rows that no old
    token has (padding) and rows of zeros (reserved, never trained) don't count in the mean over all, and this mean gets
    noise of 0.02 standard deviations in each channel, drawn from the token's text, so that new rows differ in every
    dtype (it is doubled until they do). Means are formed in float64. A matrix never shrinks: new tokens take up its
    padding first.

    Modules and parameters stay the objects they are, with their hooks, dtype, device and `requires_grad`; but a matrix
    that grows has another shape, so its gradient is dropped and optimizer state for it has to be made anew. Parameters
    besides the embeddings may be on the meta device.

    Args:
        model: any transformers model with an input embedding; output embeddings, their bias and tying are followed.
        tokenizer: the model's own.
        tokens: texts (or AddedToken), or a mapping from role ("pad_token", "eos_token", ...) to token, whose ids also
            go into the model's config and generation config (in a list of several ids, the old one's place is taken);
            the role "extra_special_tokens" takes a list. A text is matched anywhere, inside words too, without the
            spaces around it (single_word, lstrip and rstrip are False); an AddedToken says so where it is otherwise.
        special: special tokens are not shown by `decode(skip_special_tokens=True)`; those that exist stay.
        init: "mean", "subwords", {token: description}, "copy:<token>", a tensor (number of tokens, hidden), or a
            function `init(token, rows) -> (hidden,)` of the text and a copy of the matrix. The output bias follows: the
            mean over the same old tokens, or over all where a tensor or a function gives the row.
        output_init: the same for the output matrix and from its own rows; default: as `init`. Must be given where
            `init` is a tensor and the matrices are two, must not where they are one or there is no output.
        pad_to_multiple_of: round the number of rows up to a multiple; rows that this adds are set to the mean.

    Returns:
        Ids, sizes, tying, and how each row was set.

    Raises:
        TypeError: an argument or what `init` returns is of another type; an embedding is quantised or adapted.
        ValueError: a token exists, repeats, is empty or is not read back by the tokenizer; the tokenizer has an id
            beyond the embedding; an initialiser doesn't fit.

    Reference:
        Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021,
        https://nlp.stanford.edu/~johnhew/vocab-expansion.html

    Example:
        >>> report = longattn.add_tokens(model, tokenizer, ["<tool>", "</tool>"], init="subwords")
        >>> report = longattn.add_tokens(model, tokenizer, {"pad_token": "<pad>"}, pad_to_multiple_of=64)
    """
    plan = prepare_tokens(
        model,
        tokenizer,
        tokens,
        special=special,
        init=init,
        output_init=output_init,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    return plan.apply()


def prepare_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str | AddedToken] | Mapping[str, object],
    *,
    special: bool = True,
    init: Init = "mean",
    output_init: Init | None = None,
    pad_to_multiple_of: int | None = None,
) -> TokenPlan:
    """Check all that `add_tokens` (same arguments) will do and compute the new rows, changing nothing.

    Returns:
        What `apply()` carries out.

    Raises:
        TypeError, ValueError: as `add_tokens`.

    Example:
        >>> plan = prepare_tokens(model, tokenizer, ["<tool>"])
        >>> report = plan.apply()
    """
    _check_types(model, tokenizer)
    named = new_tokens(tokens, special, tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
    multiple = _check_multiple(pad_to_multiple_of)
    matrices = find_matrices(model)
    # subwords are cut by a copy, too: encoding a text sets the truncation and padding that a tokenizer keeps
    scratch = copy.deepcopy(tokenizer)
    vocab = scratch.get_vocab()
    old_ids = sorted(vocab.values())
    _check_fits(matrices, old_ids)
    for token in named:
        known = existing_id(scratch, token.text, vocab)
        if known is not None:
            raise ValueError(f"add_tokens: tokens must be new, got {token.text!r}, which has id {known}")
    texts = [token.text for token in named]
    rules = _read_rules(matrices, init, output_init, texts, scratch)
    ids = stage(scratch, named, old_ids)
    rows = -(-max(matrices.rows, max(ids) + 1) // multiple) * multiple
    padding = sorted(set(range(matrices.rows, rows)) - set(ids))
    filled = [make_rows(part, old_ids, rules[part.name], len(padding)) for part in matrices.parts]
    how = {part: {text: rule.how for text, rule in of_part.items()} for part, of_part in rules.items()}
    report = TokenReport(
        ids=dict(zip(texts, ids, strict=True)),
        roles={token.role: token.text for token in named if token.role is not None},
        special=special,
        tokenizer_size=(len(tokenizer), len(scratch)),
        rows=(matrices.rows, rows),
        tied=None if matrices.output is None else matrices.tied,
        input_rows=how["input"],
        output_rows=None if matrices.output is None else how.get("output", how["input"]),
        padding_rows=padding,
    )
    return TokenPlan(model, tokenizer, named, matrices, filled, report)


def _check_types(model: object, tokenizer: object) -> None:
    from transformers import PreTrainedTokenizerBase

    check_model("add_tokens", model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"add_tokens: tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")


def _check_multiple(pad_to_multiple_of: int | None) -> int:
    multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
    if isinstance(multiple, bool) or not isinstance(multiple, int):
        raise TypeError(f"add_tokens: pad_to_multiple_of must be an int, got {pad_to_multiple_of!r}")
    if multiple < 1:
        raise ValueError(f"add_tokens: pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
    if multiple > MAX_MULTIPLE:
        raise ValueError(f"add_tokens: pad_to_multiple_of must be at most {MAX_MULTIPLE}, got {pad_to_multiple_of}")
    return multiple


def _check_fits(matrices: Matrices, old_ids: Sequence[int]) -> None:
    if old_ids and old_ids[-1] >= matrices.rows:
        raise ValueError(
            f"add_tokens: tokenizer must have ids below the {matrices.rows} rows of the model's embedding, "
            f"got {old_ids[-1]}: is it another model's?"
        )


def _read_rules(
    matrices: Matrices, init: Init, output_init: Init | None, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, RowRule]]:
    """The rule of each token's row in each matrix."""
    rules = {"input": read_init("init", init, texts, tokenizer, matrices.input.weight.shape[1])}
    if matrices.output is None or matrices.tied:
        if output_init is not None:
            why = "ties its output to its input embedding" if matrices.tied else "has no output embedding"
            raise ValueError(f"add_tokens: output_init must be None as the model {why}, got {describe(output_init)}")
        return rules
    if output_init is None and isinstance(init, Tensor):
        raise ValueError(
            "add_tokens: output_init must be given where init is a tensor and the output embedding is a matrix of its "
            "own, got None"
        )
    chosen, name = (init, "init") if output_init is None else (output_init, "output_init")
    rules["output"] = read_init(name, chosen, texts, tokenizer, matrices.output.weight.shape[1])
    return rules
