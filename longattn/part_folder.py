"""The folder that a checkpoint grows in until it is whole; changes with what keeps half of one from being seen."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["whole_or_absent"]


@contextlib.contextmanager
def whole_or_absent(target: Path) -> Iterator[Path]:
    """Give a new hidden folder beside `target`, which takes that name at the end of the block and goes on an error.

    A process that is killed leaves its folder behind, `.<name>.<random>.part`. The lock on the folder goes with the
    process, so that the next run to the same target knows it from one that is being written, and removes it.

    Args:
        target: the folder to write, absolute.

    Raises:
        OSError: a folder can't be made, or `target` has appeared meanwhile.

    Example:
        >>> with whole_or_absent(Path("Llama-2-7b-32k").absolute()) as folder:
        ...     (folder / "config.json").write_text("{}")
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{_escaped(target.name)}.*.part"):
        _remove_unlocked(left)
    part, lock = _new_locked(target)
    try:
        yield part
        _sync(part)
        part.rename(target)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    with contextlib.suppress(OSError):  # the folder is there and whole; some file systems can't sync its entry
        _sync_one(target.parent)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _new_locked(target: Path) -> tuple[Path, int | None]:
    """A new folder and the descriptor that holds its lock, None where the system has no such locks."""
    while True:
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        part.mkdir()
        try:
            lock = _locked(part)
        except OSError:
            return part, None
        if lock is not None and part.is_dir():  # else another run took it for one that was left, before it was locked
            return part, lock
        if lock is not None:
            os.close(lock)


def _remove_unlocked(part: Path) -> None:
    """Remove a folder that no process holds; where that can't be told it stays."""
    try:
        lock = _locked(part)
    except OSError:
        return
    if lock is not None:
        shutil.rmtree(part, ignore_errors=True)
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """The descriptor of a folder, locked until it is closed or the process ends; None where another one holds it.

    Raises:
        OSError: the system or the file system has no such locks, or the folder can't be opened.
    """
    if sys.platform == "win32":
        raise OSError("folders can't be locked on Windows")
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sync(folder: Path) -> None:
    """Have all that was written on the disk, so that no crash and no late error leaves half of it under its name."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if sys.platform != "win32" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
