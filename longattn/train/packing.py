"""Rows of one length out of documents of any; changes with how documents are laid into rows."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from longattn.checkpoint_source import knows_no_text
from longattn.train.texts import read_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PackedDataset", "packed_dataset"]

DOCUMENTS_AT_ONCE = 64  # which the tokenizer's threads share
IGNORED = -100  # a label that transformers' losses leave out


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Rows of `length` tokens, cut out of one stream; any collator that stacks takes them.

    Args:
        ids: int32 (N,), the stream; what is left after the last whole row is not used.
        starts: int64 (documents,), where in the stream each document starts, ascending.
        length: tokens of a row.
        separate: whether rows tell documents apart, by `position_ids` that start again.
    """

    def __init__(self, ids: Tensor, starts: Tensor, length: int, *, separate: bool = False) -> None:
        self.ids, self.starts = ids, starts
        self.length, self.separate = length, separate

    @property
    def num_documents(self) -> int:
        """Documents in the stream."""
        return len(self.starts)

    def digest(self) -> str:
        """Of all rows: datasets that give the same rows have the same."""
        found = hashlib.sha256(f"{self.length} {self.separate}".encode())
        for stream in (self.ids, self.starts):
            found.update(stream.numpy().tobytes())
        return found.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.ids) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row: input_ids, labels and, where documents are told apart, position_ids, each int64 (length,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"PackedDataset: index must be 0 to {len(self) - 1}, got {index}")
        begin = index * self.length
        ids = self.ids[begin : begin + self.length].long()  # (length,)
        if not self.separate:
            return {"input_ids": ids, "labels": ids.clone()}
        first, last = torch.searchsorted(self.starts, torch.tensor([begin, begin + self.length])).tolist()
        starts = self.starts[first:last] - begin  # of documents that start in the row
        labels = ids.clone()
        labels[starts] = IGNORED  # the document before it does not predict it
        count = torch.arange(self.length)
        began = torch.zeros(self.length, dtype=torch.int64)
        began[starts] = starts
        return {"input_ids": ids, "labels": labels, "position_ids": count - began.cummax(0).values}


def packed_dataset(
    texts: str | os.PathLike[str] | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    separate: bool = False,
    field: str = "text",
) -> PackedDataset:
    """Join documents, an end-of-text token after each, and cut the stream into rows of one length.

    Args:
        texts: a path as `read_texts` takes it, or documents.
        tokenizer: turns a document into ids, with what it puts before a text itself.
        length: tokens of a row. No row is padded; what is left after the last whole row is not used.
        separate: whether rows tell documents apart: `position_ids` start again at each, so that no query sees another
            document; a document that a row cuts goes on in the next as one of its own. By default queries see the
            documents before theirs, as in most pretraining.
        field: as for `read_texts`.

    Returns:
        The rows, a torch dataset for Trainer.

    Raises:
        OSError: a file can't be read.
        TypeError: a document is no text.
        ValueError: the documents don't fill one row, or the tokenizer has no end-of-text token, or special
            tokens alone, as one whose files are missing.

    Example:
        >>> rows = longattn.train.packed_dataset("corpus/", tokenizer, 32768)
        >>> transformers.Trainer(model, arguments, train_dataset=rows)
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"packed_dataset: length must be an int of at least 2, got {length!r}")
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("packed_dataset: the tokenizer must have an eos_token, which goes between documents, got none")
    if knows_no_text(tokenizer):
        raise ValueError("packed_dataset: the tokenizer must know more than special tokens; are its files missing?")
    ids, starts = array("i"), array("q")
    documents = iter(read_texts(texts, field=field) if isinstance(texts, (str, os.PathLike)) else texts)
    while some := list(islice(documents, DOCUMENTS_AT_ONCE)):
        for text in some:
            if not isinstance(text, str):
                raise TypeError(f"packed_dataset: documents must be texts, got {type(text).__name__}")
        filled = [text for text in some if text]
        for found in tokenizer(filled, verbose=False)["input_ids"] if filled else []:
            starts.append(len(ids))
            ids.extend(found)
            if found[-1:] != [end]:
                ids.append(end)
    if len(ids) < length:
        raise ValueError(
            f"packed_dataset: the text must fill at least one row of length {length}, got {len(ids)} tokens of "
            f"{len(starts)} documents"
        )
    return PackedDataset(
        torch.frombuffer(ids, dtype=torch.int32), torch.frombuffer(starts, dtype=torch.int64), length, separate=separate
    )
