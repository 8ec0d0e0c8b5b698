"""Sequences longer than one device: context parallelism on torch.distributed.

`window_attention` and `group_attention` attend over a sequence whose shards lie on ranks; `shard_batch` cuts a batch,
`ContextParallel` and `parallelize` give a model's layers their group, `prefill` reads a long prompt, `count_traffic`
counts what is sent.
"""

from typing import Any

from longattn.distributed.attention import group_attention, window_attention
from longattn.distributed.batch import shard_batch
from longattn.distributed.messages import Traffic, count_traffic
from longattn.distributed.style import ContextParallel, parallelize, release

__all__ = [
    "ContextParallel",
    "Traffic",
    "count_traffic",
    "group_attention",
    "parallelize",
    "prefill",
    "release",
    "shard_batch",
    "window_attention",
]


def __getattr__(name: str) -> Any:
    if name != "prefill":
        raise AttributeError(f"module 'longattn.distributed' has no attribute {name!r}")
    from longattn.hf.prefill import prefill  # needs transformers

    globals()["prefill"] = prefill
    return prefill
