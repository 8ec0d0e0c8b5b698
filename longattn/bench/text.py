"""How numbers and exceptions read in a table's cell."""

from __future__ import annotations

__all__ = ["first_line", "milliseconds", "size"]


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a cell."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    named = [line for line in lines if "Error: " in line]  # torch.compile wraps the error that it met
    text = named[0] if named else f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= 100 else text[:97] + "..."


def size(number: float | None) -> str:
    """Bytes in MiB."""
    return "" if number is None else f"{number / 2**20:,.0f} MiB"


def milliseconds(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
