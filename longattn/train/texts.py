"""Texts to train on, from whatever `longattn.text` reads."""

from __future__ import annotations

import os
from collections.abc import Iterator

from longattn.text import load_documents

__all__ = ["read_texts"]


def read_texts(path: str | os.PathLike[str], *, field: str = "text") -> Iterator[str]:
    """Read documents, one at a time; arguments and errors are those of `longattn.text.load_documents`.

    Example:
        >>> documents = list(longattn.train.read_texts("corpus/"))
    """
    for document in load_documents(path, field=field):
        yield document.text
