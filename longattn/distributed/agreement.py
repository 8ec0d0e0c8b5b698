"""Comparing arguments across ranks before tensors travel; changes with what ranks have to agree on.

On the CPU every call, forward and backward, begins with 8 bytes from each rank to each: the hash of its signature. On
other devices, where the host must not wait, a signature is compared through the store of the process group the first
time that a rank meets it, and what is mixed up later is left to the backend's own watchdog.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from longattn.distributed.messages import counted, waiting

__all__ = ["agree", "first_time", "refuse"]

REMEMBERED = 4096  # signatures of a group; all ranks forget the same ones


class _Log:
    """What this rank has done on one process group: calls, by forward or backward, and comparisons by the store."""

    def __init__(self) -> None:
        self.calls = {"forward": 0, "backward": 0}
        self.compared = 0
        self.agreed: OrderedDict[str, None] = OrderedDict()
        self.seen: set[object] = set()


_logs: WeakKeyDictionary[dist.ProcessGroup, _Log] = WeakKeyDictionary()


def agree(group: dist.ProcessGroup, way: str, device: str, op: str, signature: dict[str, Any]) -> None:
    """Count a call, and make sure that all ranks of the group make it.

    Args:
        group: whose ranks all make this call.
        way: "forward" or "backward".
        device: type of the tensors' device.
        op: name of the function.
        signature: argument -> a value of JSON's types, the same on all ranks.

    Raises:
        ValueError: the ranks differ, or another rank refused its arguments.
        RuntimeError: a rank did not call within the timeout of the group.
    """
    log = _count(group, way)
    if device == "cpu":
        entry = {"function": op, "pass": way, f"number of {way} passes": log.calls[way], **signature}
        text = json.dumps(entry)
        if not _same_everywhere(group, op, text):
            _compare(group, log, op, text)
        return
    text = json.dumps({"function": op, "pass": way, **signature})
    if text not in log.agreed and way == "forward":
        _compare(group, log, op, text)
        log.agreed[text] = None
        if len(log.agreed) > REMEMBERED:
            log.agreed.popitem(last=False)


def refuse(group: dist.ProcessGroup, device: str, op: str, error: Exception) -> NoReturn:
    """Count a call whose arguments this rank refuses, tell the others, and raise the error."""
    log = _count(group, "forward")
    text = json.dumps({"error": str(error)})
    if device == "cpu":
        _same_everywhere(group, op, text)
    _post(group, log, text)
    raise error


def first_time(group: dist.ProcessGroup, what: object) -> bool:
    """Whether this rank asks for the first time on this group; what is asked for is hashable."""
    seen = _logs.setdefault(group, _Log()).seen
    known = what in seen
    seen.add(what)
    return not known


def _count(group: dist.ProcessGroup, way: str) -> _Log:
    log = _logs.setdefault(group, _Log())
    log.calls[way] += 1
    return log


def _same_everywhere(group: dist.ProcessGroup, op: str, text: str) -> bool:
    digest = hashlib.sha256(text.encode()).digest()[:8]
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True)])
    hashes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    counted(control=mine.nbytes * (len(hashes) - 1))
    try:
        with waiting():
            dist.all_gather(hashes, mine, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: not every rank of the group made this call within its timeout: {str(error).splitlines()[0]}"
        ) from error
    return all(torch.equal(other, mine) for other in hashes)


def _compare(group: dist.ProcessGroup, log: _Log, op: str, text: str) -> None:
    """Raise where a rank refused its arguments, or has others than this one; all ranks find the same."""
    keys = _post(group, log, text)
    store = _get_process_group_store(group)
    try:
        store.wait(keys)
        told = [json.loads(store.get(key)) for key in keys]
    except (dist.DistError, RuntimeError) as error:
        silent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(
            f"{op}: ranks {silent} of the group did not make this call, new on this one, within the group's timeout: "
            f"{str(error).splitlines()[0]}"
        ) from error
    for rank, entry in enumerate(told):
        if "error" in entry:
            raise ValueError(f"{op}: rank {rank} of the group refused its arguments: {entry['error']}")
    for name in {name: None for entry in told for name in entry}:
        for rank, entry in enumerate(told):
            if entry.get(name) != told[0].get(name):
                raise ValueError(
                    f"{op}: all ranks must be given the same {name}, got {_short(told[0].get(name))} on rank 0 and "
                    f"{_short(entry.get(name))} on rank {rank} of the group"
                )


def _post(group: dist.ProcessGroup, log: _Log, text: str) -> list[str]:
    """Say to the others what this rank was given; returns where each rank says so."""
    store, rank = _get_process_group_store(group), dist.get_rank(group)
    if log.compared > 1:  # all ranks have read what they said then, or they would not have come to the last one
        store.delete_key(f"longattn/{log.compared - 1}/{rank}")
    log.compared += 1
    store.set(f"longattn/{log.compared}/{rank}", text)
    return [f"longattn/{log.compared}/{other}" for other in range(dist.get_world_size(group))]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
