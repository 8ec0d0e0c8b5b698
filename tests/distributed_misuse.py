"""Calls that are wrong on some rank, and what each rank hears of them."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longattn import distributed
from longattn.distributed import agreement

SILENT = ("skips", "skips backward")
SHORT = timedelta(seconds=5)


def shards(group: dist.ProcessGroup, tokens: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rank = dist.get_rank(group)
    generator = torch.Generator().manual_seed(rank)
    shapes = [(1, heads, tokens, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def on_rank_1(group: dist.ProcessGroup, common: dict[str, Any], other: dict[str, Any]) -> str:
    """What a rank hears when rank 1 is given other arguments; afterwards a right call must go through."""
    given = {**common, **other} if dist.get_rank(group) == 1 else common
    given = {name: value for name, value in given.items() if value is not None}
    tokens, dtype = given.pop("tokens", 8), given.pop("dtype", torch.float32)
    function = distributed.group_attention if "group_size" in given else distributed.window_attention
    try:
        function(*shards(group, tokens, dtype), **given, group=group)
        heard = "nothing"
    except (TypeError, ValueError, RuntimeError) as error:
        heard = f"{type(error).__name__}: {error}"
    out = distributed.window_attention(*shards(group), 3, group=group)
    return heard if bool(out.isfinite().all()) else "not finite"


def some_leave(group: dist.ProcessGroup, how: str) -> str:
    """What a rank hears when rank 1 does not do its part."""
    rank = dist.get_rank(group)
    dist.barrier(group)  # all have started
    if how in SILENT:
        dist.distributed_c10d._set_pg_timeout(SHORT, group)
    query, key, value = shards(group)
    if how == "another known call":  # both calls have been compared before
        for window in (4, 6):
            distributed.window_attention(query, key, value, window, group=group)
    try:
        if rank == 1 and how == "skips":
            return "left"
        if rank == 1 and how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        window = 6 if rank == 1 and how == "another known call" else 4
        out = distributed.window_attention(query, key, value, window, group=group)
        if rank == 1 and how == "is killed in backward":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and how == "skips backward":
            return "left"
        out.sum().backward()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def skips_one(group: dist.ProcessGroup) -> str:
    """What a rank hears when rank 1 has left out a call and goes on with the next."""
    log = agreement._logs[group]
    tensors = shards(group)
    for skipped in (True, False):
        if skipped and dist.get_rank(group) == 1:
            log.calls["forward"] -= 1  # as if its own call had not been made
        try:
            distributed.window_attention(*tensors, 4, group=group)
        except ValueError as error:
            heard = str(error)
            log.calls["forward"] += dist.get_rank(group) if skipped else 0
    return heard


def by_store(group: dist.ProcessGroup) -> list[str]:
    """What a rank hears of three calls on a device, the second known, the third another on rank 1."""
    heard = []
    for window in (4, 4, 5 + dist.get_rank(group)):
        try:
            agreement.agree(group, "forward", "cuda", "by_store", {"window": window})
            heard.append("agreed")
        except ValueError as error:
            heard.append(str(error))
    return heard
