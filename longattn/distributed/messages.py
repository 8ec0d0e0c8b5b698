"""Messages between ranks and what they cost; changes with the collective used.

`all_to_all_single` with a split a rank serves gloo and NCCL (which sends nothing where a split is 0), and any sub-mesh.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

__all__ = ["Flight", "Traffic", "count_traffic", "counted", "send", "waiting"]


@dataclass
class Traffic:
    """What one rank sent, received and waited for.

    Args:
        sent_bytes, received_bytes: keys, values, their gradients, and what full layers trade; to and from other ranks.
        messages: to other ranks, empty ones not counted.
        control_bytes: hashes of arguments, sent to other ranks.
        seconds: in which the host did nothing but wait for other ranks. On devices, whose streams wait in its place,
            a profiler tells more.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    messages: int = 0
    control_bytes: int = 0
    seconds: float = 0.0


_open: list[Traffic] = []  # of every thread, since backward may run in another


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what longattn's sharded attention sends from this rank while the block runs.

    Example:
        >>> with count_traffic() as traffic:
        ...     pass
        >>> traffic.sent_bytes
        0
    """
    traffic = Traffic()
    _open.append(traffic)
    try:
        yield traffic
    finally:
        _open[:] = [other for other in _open if other is not traffic]


def counted(sent: int = 0, received: int = 0, messages: int = 0, control: int = 0) -> None:
    """Add to all open counts."""
    for traffic in _open:
        traffic.sent_bytes += sent
        traffic.received_bytes += received
        traffic.messages += messages
        traffic.control_bytes += control


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Count the time of the block as waiting for other ranks."""
    start = time.perf_counter()
    try:
        yield
    finally:
        for traffic in _open:
            traffic.seconds += time.perf_counter() - start


@dataclass
class Flight:
    """A message under way: `arrived` waits for it and returns what was received; `sent` must live until then."""

    received: Tensor
    sent: Tensor
    work: dist.Work

    def arrived(self) -> Tensor:
        with waiting():
            self.work.wait()
        return self.received


def send(to: Tensor, rows: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup) -> Flight:
    """Start to send the first `sent[0]` of `rows` to rank 0, the next `sent[1]` to rank 1, and to receive into `to`.

    Args:
        to: (sum(received), ...), rows by the rank that they come from.
        rows: (sum(sent), ...), contiguous.
        received, sent: rows from and to each rank of the group; what goes to this rank itself is not counted.
        group: whose ranks all make this call.
    """
    rank, row = dist.get_rank(group), _row_bytes(rows)
    others = [count for other, count in enumerate(sent) if other != rank and count]
    counted(row * sum(others), row * (sum(received) - received[rank]), len(others))
    work = dist.all_to_all_single(to, rows, list(received), list(sent), group=group, async_op=True)
    return Flight(to, rows, work)


def _row_bytes(rows: Tensor) -> int:
    return rows.shape[1:].numel() * rows.element_size()
