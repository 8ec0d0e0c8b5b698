"""Training on transformers' Trainer, TRL and PEFT: recipes, packed text, a token counter, and `longattn train`.

Nothing here is a trainer: the functions give models, datasets and callbacks to those that exist.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longattn.train.packing import PackedDataset, packed_dataset
    from longattn.train.recipes import longlora, longlora_config, merge, new_rows
    from longattn.train.run import TrainResult, train
    from longattn.train.spec import TrainSpec
    from longattn.train.speed import TokensPerSecond
    from longattn.train.texts import read_texts

_LAZY = {
    "PackedDataset": "packing",
    "TokensPerSecond": "speed",
    "TrainResult": "run",
    "TrainSpec": "spec",
    "longlora": "recipes",
    "longlora_config": "recipes",
    "merge": "recipes",
    "new_rows": "recipes",
    "packed_dataset": "packing",
    "read_texts": "texts",
    "train": "run",
}

__all__ = [
    "PackedDataset",
    "TokensPerSecond",
    "TrainResult",
    "TrainSpec",
    "longlora",
    "longlora_config",
    "merge",
    "new_rows",
    "packed_dataset",
    "read_texts",
    "train",
]


def __getattr__(name: str) -> Any:
    """What needs peft or transformers loads on use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'longattn.train' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"longattn.train.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
