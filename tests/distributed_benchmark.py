"""benchmarks/context_parallel.py on a gloo rank."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import torch.distributed as dist

from longattn import distributed

PATH = Path(__file__).parents[1] / "benchmarks" / "context_parallel.py"


@functools.cache
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_over_ranks", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def errors(group: dist.ProcessGroup) -> dict[str, float]:
    """Of each way; the group is the whole world."""
    return {way: benchmark().check(way) for way in benchmark().WAYS}


def halo_bytes(group: dist.ProcessGroup) -> list[int]:
    """Sent by this rank for the messages alone, and in a forward and backward."""
    module, found = benchmark(), []
    tensors = module.inputs(4096, module.own("longattn", 4096))
    for call in (module.halo_messages, module.halo):
        with distributed.count_traffic() as traffic:
            call(*tensors)
        found.append(traffic.sent_bytes + traffic.received_bytes)
    return found
