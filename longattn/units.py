"""Numbers as people read them: bytes, operations and seconds in the largest unit that fits, perplexities."""

from __future__ import annotations

import math

__all__ = ["format_bytes", "format_flops", "format_perplexity", "format_seconds"]


def format_bytes(number: float) -> str:
    """Write a number of bytes.

    Example:
        >>> format_bytes(805306368)
        '768 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:,.4g} TiB"


def format_flops(number: float) -> str:
    """Write a number of floating point operations.

    Example:
        >>> format_flops(137438953472)
        '137.4 GFLOP'
    """
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if number < 1000:
            return f"{number:.4g} {unit}"
        number /= 1000
    return f"{number:,.4g} PFLOP"


def format_seconds(number: float) -> str:
    """Write a time.

    Example:
        >>> format_seconds(0.00037)
        '0.37 ms'
    """
    return f"{number * 1e3:.3g} ms" if number < 1 else f"{number:,.3g} s"


def format_perplexity(number: float) -> str:
    """Write a perplexity with as many digits as are worth reading.

    Example:
        >>> format_perplexity(123.456)
        '123.5'
    """
    if not math.isfinite(number):
        return "not a number" if math.isnan(number) else "infinite"
    return f"{number:,.0f}" if number >= 1000 else f"{number:.1f}" if number >= 100 else f"{number:.2f}"
