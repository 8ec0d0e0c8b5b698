"""What the experiment reads: the standard library's sources as tokens, with a recall task written into some rows.

The text is on every machine that has Python. Of its files some are held out for scoring, by the hash of their names.
The recall task: pairs of a key and a value stand among the text; where a key comes again, its value can be known from
the first pair, however far away that is. Nothing else tells it, so that a model that loses what is far away fails.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longattn.demo.text import Document, read_documents

BEGIN, END = "<|begin|>", "<|end|>"
NUM_KEYS, NUM_VALUES = 16, 8
FACTS = [f"<{key}={value}>" for key in range(NUM_KEYS) for value in range(NUM_VALUES)]
QUESTIONS = [f"<{key}?>" for key in range(NUM_KEYS)]
VALUES = [f"<{value}>" for value in range(NUM_VALUES)]
MAX_CHARS_OF_ONE = 65536  # so that one long file is not most of the text


@dataclass(frozen=True)
class Ids:
    """The ids of the tokens that the task and the rows are made of."""

    begin: int
    facts: torch.Tensor  # (NUM_KEYS, NUM_VALUES)
    questions: torch.Tensor  # (NUM_KEYS,)
    values: torch.Tensor  # (NUM_VALUES,)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Ids:
        names = (FACTS, QUESTIONS, VALUES)
        facts, questions, values = (torch.tensor(tokenizer.convert_tokens_to_ids(group)) for group in names)
        return cls(tokenizer.bos_token_id, facts.view(NUM_KEYS, NUM_VALUES), questions, values)


def train_tokenizer(documents: Sequence[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the trained files, with a token for the begin, the end, each key and each value."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, *FACTS, *QUESTIONS, *VALUES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def token_stream(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """int64 (N,): the documents' ids, an end after each."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document.text[:MAX_CHARS_OF_ONE], add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def training_rows(stream: torch.Tensor, ids: Ids, *, rows: int, length: int, draw: torch.Generator) -> torch.Tensor:
    """int64 (rows, length): pieces of the text after a begin; every second row has facts and questions among its text.

    Each of 4, 8 or 16 keys is given once and asked for one to four times after that, all of it anywhere in the row.
    """
    starts = torch.randint(0, len(stream) - length, (rows,), generator=draw).tolist()
    batch = torch.stack([stream[start : start + length] for start in starts])
    batch[:, 0] = ids.begin
    for row in range(0, rows, 2):
        count = min((length - 1) // 4, 4 << int(torch.randint(0, 3, (), generator=draw)))
        times = 2 + int(torch.randint(0, 4, (), generator=draw))
        times = min(times, (length - 1) // (2 * count))
        keys = torch.randperm(NUM_KEYS, generator=draw)[:count].repeat(times)
        keys = keys[torch.randperm(len(keys), generator=draw)]
        slots = torch.randperm((length - 1) // 2, generator=draw)[: len(keys)].sort().values
        batch[row] = _written(batch[row], ids, keys, 1 + 2 * slots, draw)
    return batch


def dense_rows(stream: torch.Tensor, ids: Ids, *, rows: int, length: int, draw: torch.Generator) -> torch.Tensor:
    """int64 (rows, length): facts and questions alone, of 4, 8 or 16 keys, from which the task is learnt first."""
    batch = []
    pairs = (length - 1) // 2
    for start in torch.randint(0, len(stream) - length, (rows,), generator=draw).tolist():
        text = stream[start : start + length].clone()
        text[0] = ids.begin
        count = 4 << int(torch.randint(0, 3, (), generator=draw))
        keys = torch.randperm(NUM_KEYS, generator=draw)[:count].repeat(pairs // count + 1)[:pairs]
        keys = keys[torch.randperm(pairs, generator=draw)]
        batch.append(_written(text, ids, keys, 1 + 2 * torch.arange(pairs), draw))
    return torch.stack(batch)


def recall_rows(
    stream: torch.Tensor, ids: Ids, *, rows: int, length: int, keys: int, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose last tokens ask for every key once, after each was given once, anywhere before.

    Returns:
        int64 (rows, length), of which the last `2 * keys` tokens are the questions and their answers; and int64
        (rows, keys), the position of the fact that answers a question.
    """
    batch, places = [], []
    starts = torch.randint(0, len(stream) - length, (rows,), generator=draw).tolist()
    asked = length - 2 * torch.arange(keys, 0, -1)
    for start in starts:
        text = stream[start : start + length].clone()
        text[0] = ids.begin
        names = torch.randperm(NUM_KEYS, generator=draw)[:keys]
        given = 1 + torch.randperm(length - 2 * keys - 1, generator=draw)[:keys].sort().values
        again = torch.randperm(keys, generator=draw)
        batch.append(_written(text, ids, torch.cat([names, names[again]]), torch.cat([given, asked]), draw))
        places.append(given[again])
    return torch.stack(batch), torch.stack(places)


def _written(
    row: torch.Tensor, ids: Ids, keys: torch.Tensor, places: torch.Tensor, draw: torch.Generator
) -> torch.Tensor:
    """Facts, where a key comes first, and questions with answers, where it comes again, at rising places of the row.

    The row's text stands around them, as far as it goes.
    """
    values = torch.randint(0, NUM_VALUES, (NUM_KEYS,), generator=draw)[keys]
    came = torch.tensor([bool((keys[:at] == key).any()) for at, key in enumerate(keys)])
    taken = torch.zeros(len(row), dtype=torch.bool)
    taken[places] = taken[places[came] + 1] = True
    out = torch.empty_like(row)
    out[~taken] = row[: int((~taken).sum())]
    out[places] = torch.where(came, ids.questions[keys], ids.facts[keys, values])
    out[places[came] + 1] = ids.values[values[came]]
    return out


def text_facts(trained: Sequence[Document], scored: Sequence[Document]) -> dict[str, Any]:
    """What was read: sizes, a hash of all of it, and whose library it was."""
    digest = hashlib.sha256()
    for document in [*trained, *scored]:
        digest.update(document.name.encode() + b"\0" + document.text.encode() + b"\0")
    return {
        "text": f"the standard library of Python {platform.python_version()}",
        "sha256": digest.hexdigest(),
        "trained_files": len(trained),
        "trained_chars": sum(len(document.text) for document in trained),
        "scored_files": len(scored),
        "scored_chars": sum(len(document.text) for document in scored),
    }


def documents(most: int | None = None) -> tuple[list[Document], list[Document]]:
    """The trained and the scored files, at most so many of each."""
    return read_documents(scored=False)[:most], read_documents(scored=True)[:most]
