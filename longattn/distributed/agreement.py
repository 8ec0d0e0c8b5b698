"""Comparing arguments across ranks before any tensor travels; changes with what ranks have to agree on.

Ranks talk through the store of their process group, not through a collective, so that a rank whose arguments are
refused can say so and leave at once. A signature is compared the first time that a rank meets it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

__all__ = ["agree", "refuse"]

REMEMBERED = 4096  # signatures of a group; all ranks forget the same ones


class _Log:
    """The calls of one process group that this rank has made."""

    def __init__(self) -> None:
        self.calls = 0
        self.agreed: OrderedDict[str, None] = OrderedDict()
        self.last_key: str | None = None


_logs: WeakKeyDictionary[dist.ProcessGroup, _Log] = WeakKeyDictionary()


def agree(group: dist.ProcessGroup, op: str, signature: dict[str, Any]) -> None:
    """Count a call, and compare its signature with that of the other ranks where it is a new one.

    Args:
        group: whose ranks all make this call.
        op: name of the function.
        signature: argument -> a value of JSON's types, the same on all ranks.

    Raises:
        ValueError: the ranks differ, or another rank refused its arguments.
        RuntimeError: a rank did not call within the timeout of the group's store.
    """
    log = _logs.setdefault(group, _Log())
    log.calls += 1
    text = json.dumps({"op": op, **signature})
    if text in log.agreed:
        log.agreed.move_to_end(text)
        return
    key = _post(group, log, text)
    told = [json.loads(entry) for entry in _read(group, log, op)]
    for rank, entry in enumerate(told):
        if "error" in entry:
            raise ValueError(f"{op}: rank {rank} of the group refused its arguments: {entry['error']}")
    for name in {name: None for entry in told for name in entry}:
        values = [entry.get(name) for entry in told]
        if any(value != values[0] for value in values):
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise ValueError(
                f"{op}: all ranks must be given the same {name}, got {_short(values[0])} on rank 0 and "
                f"{_short(values[other])} on rank {other} of the group"
            )
    log.agreed[text] = None
    if len(log.agreed) > REMEMBERED:
        log.agreed.popitem(last=False)
    if log.last_key is not None:  # every rank has read it, or it would not have come to this one
        _get_process_group_store(group).delete_key(log.last_key)
    log.last_key = key


def refuse(group: dist.ProcessGroup, op: str, error: Exception) -> None:
    """Count a call whose arguments this rank refuses, and tell those ranks that compare theirs."""
    log = _logs.setdefault(group, _Log())
    log.calls += 1
    _post(group, log, json.dumps({"op": op, "error": str(error)}))


def _post(group: dist.ProcessGroup, log: _Log, text: str) -> str:
    key = _key(log, dist.get_rank(group))
    _get_process_group_store(group).set(key, text)
    return key


def _read(group: dist.ProcessGroup, log: _Log, op: str) -> list[str]:
    store = _get_process_group_store(group)
    keys = [_key(log, rank) for rank in range(dist.get_world_size(group))]
    try:
        store.wait(keys)
        return [store.get(key).decode() for key in keys]
    except (dist.DistError, RuntimeError) as error:
        raise RuntimeError(
            f"{op}: not all {len(keys)} ranks of the group made this call ({log.calls} on it so far) within the "
            f"timeout of its store, {store.timeout.total_seconds():g} s: {str(error).splitlines()[0]}"
        ) from error


def _key(log: _Log, rank: int) -> str:
    return f"longattn/{log.calls}/{rank}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
