"""Change a pretrained decoder-only language model's structure: longer text, fewer keys a query, new tokens.

`longattn.extend` changes a transformers model; `longattn.window_attention`, `group_attention` and `apply_rope` are the
ops behind it (also `torch.ops.longattn.*`). Importing costs no more than torch: what needs transformers loads on use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from longattn.ops.apply_rope import apply_rope
from longattn.ops.apply_rope_positions import apply_rope_positions
from longattn.ops.dispatch import debug, force, which
from longattn.ops.group_attention import group_attention
from longattn.ops.window_attention import window_attention
from longattn.rope import rope_cos_sin, rope_frequencies
from longattn.transformers_hook import register_when_loaded

if TYPE_CHECKING:
    from longattn.info import build_info
    from longattn.plan import Plan
    from longattn.surgery import extend, restore
    from longattn.vocab import add_tokens

__all__ = [
    "Plan",
    "add_tokens",
    "apply_rope",
    "apply_rope_positions",
    "build_info",
    "debug",
    "extend",
    "force",
    "group_attention",
    "restore",
    "rope_cos_sin",
    "rope_frequencies",
    "which",
    "window_attention",
]
__version__ = "0.1.0"

_LAZY = {
    "Plan": "longattn.plan",
    "add_tokens": "longattn.vocab",
    "build_info": "longattn.info",
    "extend": "longattn.surgery",
    "restore": "longattn.surgery",
}


def __getattr__(name: str) -> Any:
    if name == "hf":  # not imported before transformers' modelling code is, which may be after this is asked for
        return importlib.import_module("longattn.hf")
    if name not in _LAZY:
        raise AttributeError(f"module 'longattn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


register_when_loaded()
