"""Documents out of files, folders and saved datasets, all local; changes with which formats are read."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Document", "load_documents"]

SAVED_DATASET, SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True)
class Document:
    """A text, and its name: the file's, below the folder it was read from, and the row where a file holds several."""

    name: str
    text: str


def load_documents(path: str | os.PathLike[str], *, field: str = "text") -> Iterator[Document]:
    """Read documents, one at a time.

    Args:
        path: a text file, which is one document; `.jsonl`, `.parquet`, a document a row; what `datasets` saved by
            `save_to_disk`; or a folder, of which all files are read in the order of their names, hidden ones left out.
            Files in a folder that are not UTF-8 are left out with a warning.
        field: the column that holds the text, where rows have columns.

    Raises:
        OSError: a file can't be read.
        ValueError: a file holds no such text, or a folder no file.

    Example:
        >>> documents = list(load_documents("corpus/"))
    """
    source = Path(path).expanduser()
    if not source.is_dir():
        yield from _of_file(source, source.name, field)
    elif (source / SAVED_SPLITS).is_file():
        splits = json.loads((source / SAVED_SPLITS).read_text(encoding="utf-8")).get("splits", [])
        raise ValueError(f"text: {source} holds the splits {', '.join(splits)}; give one, such as {source / splits[0]}")
    elif (source / SAVED_DATASET).is_file():
        from datasets import load_from_disk

        for number, row in enumerate(load_from_disk(str(source)), 1):
            yield Document(f"{source.name}:{number}", _field(row, field, str(source)))
    else:
        yield from _of_folder(source, field)


def _of_folder(folder: Path, field: str) -> Iterator[Document]:
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise ValueError(f"text: {folder} holds no file")
    skipped = []
    for name in names:
        try:
            yield from _of_file(folder / name, name.as_posix(), field)
        except UnicodeDecodeError:
            skipped.append(name)
    if skipped:
        warnings.warn(
            f"text: {len(skipped)} of {len(names)} files in {folder} are not UTF-8 and left out, such as {skipped[0]}",
            stacklevel=2,
        )


def _of_file(path: Path, name: str, field: str) -> Iterator[Document]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield Document(f"{name}:{number}", _field(row, field, str(path)))
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield Document(f"{name}:{number}", _field(_json(line, place), field, place))
    else:
        yield Document(name, path.read_bytes().decode("utf-8"))


def _json(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"text: {place} is not JSON: {error.msg}") from None


def _field(row: Any, field: str, place: str) -> str:
    if not isinstance(row, Mapping):
        raise ValueError(f"text: {place} must hold an object with the field {field!r}, got {type(row).__name__}")
    if not isinstance(row.get(field), str):
        raise ValueError(f"text: {place} must have text in the field {field!r}, got fields {', '.join(row)}")
    return row[field]
