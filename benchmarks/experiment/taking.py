"""Work that several processes share, a file a piece: each takes pieces that no other is at."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Whether this process may make this file: nobody else is at it, and it isn't there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not path.exists()
        if path.exists():  # whoever holds this lock's file, or makes it anew, will find the path
            Path(lock.name).unlink(missing_ok=True)
