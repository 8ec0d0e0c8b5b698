"""Timing: calls in turns, one process, the same threads for all, every sample kept."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

__all__ = ["Clock", "DeviceClock", "Sample", "host_sample", "interleave", "median_ms"]

Clock = Literal["wall", "cpu"]
Call = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """One call: wall-clock seconds (a GPU's, by events), and processor seconds of all threads of this process."""

    wall_s: float
    cpu_s: float


def host_sample(call: Call) -> Sample:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


class DeviceClock:
    """Samples of calls that run on a GPU: between two events around as many calls as take `least_s`."""

    def __init__(self, least_s: float = 0.02) -> None:
        self._least_s = least_s
        self._repeats: dict[int, int] = {}

    def __call__(self, call: Call) -> Sample:
        repeats = self._repeats.get(id(call), 0)
        if not repeats:
            taken = max(self._run(call, 2).wall_s, 1e-7)
            repeats = self._repeats[id(call)] = 1 + int(self._least_s / taken)
        return self._run(call, repeats)

    def _run(self, call: Call, repeats: int) -> Sample:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        cpu = time.process_time()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return Sample(1e-3 * begin.elapsed_time(end) / repeats, (time.process_time() - cpu) / repeats)


def interleave(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    budget_s: float,
    least: int = 3,
    take: Callable[[Call], Sample] = host_sample,
) -> dict[str, list[Sample]]:
    """Time the calls in turns, so that a busy stretch of the machine meets all of them.

    Args:
        calls: what to time, already warm.
        rounds: how often each is called; every round starts one call further on.
        budget_s: a call that has taken this long in total sits out the rounds after its `least`-th.
        take: times one call.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    order = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            turn = number % max(1, len(order))
            for name in order[turn:] + order[:turn]:
                taken = samples[name]
                if len(taken) >= least and sum(sample.wall_s for sample in taken) > budget_s:
                    continue
                taken.append(take(calls[name]))
    finally:
        if collecting:
            gc.enable()
    return samples


def median_ms(samples: list[Sample], clock: Clock) -> float:
    """Median milliseconds by a clock; that of the processor leaves out the time that other programs had it."""
    return 1e3 * median(sample.wall_s if clock == "wall" else sample.cpu_s for sample in samples)
