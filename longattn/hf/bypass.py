"""Say when a model whose plan has attention patterns is given another attention; changes with how that is chosen."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from transformers import PreTrainedModel

from longattn.hf.record import IMPLEMENTATION

__all__ = ["warn_of_bypass"]


def warn_of_bypass() -> None:
    """Have transformers warn where a config asks for longattn's patterns and the caller for an attention without them.

    Both loading with `attn_implementation` and `set_attn_implementation` ask `_check_and_adjust_attn_implementation`.
    """
    stock = getattr(PreTrainedModel, "_check_and_adjust_attn_implementation", None)
    if stock is None or getattr(stock, "warns_of_bypass", False):
        return

    @functools.wraps(stock)
    def check(self: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        chosen = stock(self, attn_implementation, *args, **kwargs)
        record = getattr(self.config, "longattn", None)
        if isinstance(record, dict) and "attention" in record and chosen != IMPLEMENTATION:
            warnings.warn(
                f"longattn: attn_implementation {chosen!r} leaves out the attention patterns that config.longattn "
                "records, so that the model attends as it did before its plan; load it with "
                f"attn_implementation={IMPLEMENTATION!r} or without that argument, or call longattn.restore",
                stacklevel=2,
            )
        return chosen

    check.warns_of_bypass = True  # type: ignore[attr-defined]
    PreTrainedModel._check_and_adjust_attn_implementation = check  # type: ignore[method-assign]
