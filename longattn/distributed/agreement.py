"""Comparing arguments across ranks before tensors travel, and while one is waited for; changes with what must agree.

Ranks talk through the store of their process group, not through a collective, so that a rank whose arguments are
refused can say so and leave at once. A signature is compared the first time that a rank meets it; afterwards a rank
says what it waits with only where a message of gloo does not come. (NCCL's are waited for by the device, not the host:
there its own watchdog ends the wait.)
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

__all__ = ["Calling", "agree", "refuse", "repeat"]

REMEMBERED = 4096  # signatures of a group; all ranks forget the same ones
PATIENCE = 1.0  # seconds between looks at what others wait with


class _Log:
    """The calls of one process group that this rank has made."""

    def __init__(self) -> None:
        self.calls = {"forward": 0, "backward": 0}
        self.agreed: OrderedDict[str, None] = OrderedDict()
        self.last_key: str | None = None

    def next(self, way: str) -> str:
        self.calls[way] += 1
        return f"longattn/{way}/{self.calls[way]}"


_logs: WeakKeyDictionary[dist.ProcessGroup, _Log] = WeakKeyDictionary()


@dataclass(frozen=True)
class Calling:
    """One call on a group that this rank is in: `place` numbers it, `text` is its signature."""

    group: dist.ProcessGroup
    op: str
    place: str
    text: str

    @property
    def key(self) -> str:
        return f"{self.place}/{dist.get_rank(self.group)}"

    def keys(self) -> list[str]:
        return [f"{self.place}/{rank}" for rank in range(dist.get_world_size(self.group))]

    def post(self) -> None:
        _get_process_group_store(self.group).set(self.key, self.text)

    def compare(self, told: dict[int, str]) -> None:
        """Raise where a rank refused its arguments, or has others than this one."""
        told = {**told, dist.get_rank(self.group): self.text}
        entries = {rank: json.loads(text) for rank, text in sorted(told.items())}
        for rank, entry in entries.items():
            if "error" in entry:
                raise ValueError(f"{self.op}: rank {rank} of the group refused its arguments: {entry['error']}")
        first = next(iter(entries))
        for name in {name: None for entry in entries.values() for name in entry}:
            for rank, entry in entries.items():
                if entry.get(name) != entries[first].get(name):
                    raise ValueError(
                        f"{self.op}: all ranks must be given the same {name}, got {_short(entries[first].get(name))} "
                        f"on rank {first} and {_short(entry.get(name))} on rank {rank} of the group"
                    )

    def wait(self, work: dist.Work) -> None:
        """Wait for a message on the CPU, and for one that does not come say so and hear what others wait with.

        Raises:
            ValueError: another rank waits with other arguments; the group can't be used any more.
        """
        store, start, posted = _get_process_group_store(self.group), time.monotonic(), False
        look = start + PATIENCE
        while not work.is_completed():
            now = time.monotonic()
            time.sleep(min(1e-3, 2e-5 + (now - start) / 16))
            if now < look:
                continue
            if not posted:
                self.post()
                posted = True
            told = {rank: key for rank, key in enumerate(self.keys()) if store.check([key])}
            self.compare({rank: store.get(key).decode() for rank, key in told.items()})
            look = now + PATIENCE
        work.wait()  # raises what the collective raised
        if posted:
            store.delete_key(self.key)


def agree(group: dist.ProcessGroup, op: str, signature: dict[str, Any]) -> Calling:
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
    calling = Calling(group, op, log.next("forward"), json.dumps({"function": op, **signature}))
    if calling.text in log.agreed:
        log.agreed.move_to_end(calling.text)
        return calling
    calling.post()
    calling.compare(_read(calling))
    log.agreed[calling.text] = None
    if len(log.agreed) > REMEMBERED:
        log.agreed.popitem(last=False)
    if log.last_key is not None:  # every rank has read it, or it would not have come to this one
        _get_process_group_store(group).delete_key(log.last_key)
    log.last_key = calling.key
    return calling


def repeat(group: dist.ProcessGroup, op: str, signature: dict[str, Any]) -> Calling:
    """Count the backward pass of a call that was agreed on."""
    log = _logs.setdefault(group, _Log())
    return Calling(group, op, log.next("backward"), json.dumps({"function": op, **signature}))


def refuse(group: dist.ProcessGroup, op: str, error: Exception) -> None:
    """Count a call whose arguments this rank refuses, and tell those ranks that compare theirs."""
    log = _logs.setdefault(group, _Log())
    Calling(group, op, log.next("forward"), json.dumps({"error": str(error)})).post()


def _read(calling: Calling) -> dict[int, str]:
    store, keys = _get_process_group_store(calling.group), calling.keys()
    try:
        store.wait(keys)
        return {rank: store.get(key).decode() for rank, key in enumerate(keys)}
    except (dist.DistError, RuntimeError) as error:
        silent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(
            f"{calling.op}: ranks {silent} of the group did not make this call, its first with these arguments, within "
            f"the group's timeout: {str(error).splitlines()[0]}"
        ) from error


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
