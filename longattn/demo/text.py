"""Real text that every machine has: the standard library's sources, and which of its files may be trained on."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from longattn.text import Document

__all__ = ["is_scored", "read_documents"]

SCORED_OF = 6  # one file of so many is scored, the others are trained on
# installed packages are not the standard library; the rest is generated, or differs with what was installed
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "encodings"})
SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")


def is_scored(name: str) -> bool:
    """Whether the file of this relative path is held out for scoring; the same on every machine and Python.

    The SHA-256 of the path, not of the content, decides, so that no version of a scored file was ever trained on.
    """
    return name_hash(name) % SCORED_OF == 0


def name_hash(name: str) -> int:
    """SHA-256 of a relative path, as an int: an order of the files that depends on nothing else."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")


def read_documents(scored: bool, min_chars: int = 1, root: Path | None = None) -> list[Document]:
    """Read the standard library's scored or trained files, in the order of their names' hashes.

    Args:
        scored: the scored files, or the trained ones.
        min_chars: leave out shorter files.
        root: where the standard library lies, this Python's own by default.

    Raises:
        ValueError: there is no such file, as in a Python whose library is a zip or ships as bytecode only.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    documents = [doc for doc in _documents(root, scored) if len(doc.text) >= min_chars]
    if not documents:
        raise ValueError(f"demo: no Python source with at least {min_chars} characters to read under {root}")
    return sorted(documents, key=lambda doc: name_hash(doc.name))


def _documents(root: Path, scored: bool) -> Iterator[Document]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        skipped = not SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) or path.name.startswith(SKIPPED_PREFIXES)
        if skipped or is_scored(relative.as_posix()) != scored:
            continue
        try:
            yield Document(relative.as_posix(), path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError:  # a few sources declare another encoding
            continue
