"""Timing: calls in turns, one process, the same threads for all, every sample kept."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

__all__ = ["Clock", "Sample", "interleave", "median_ms"]

Clock = Literal["wall", "cpu"]


@dataclass(frozen=True)
class Sample:
    """One call: wall-clock seconds, and processor seconds of all its threads."""

    wall_s: float
    cpu_s: float


def interleave(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, budget_s: float, least: int = 3
) -> dict[str, list[Sample]]:
    """Time the calls in turns, so that a busy stretch of the machine meets all of them.

    Args:
        calls: what to time, already warm.
        rounds: how often each is called; every round starts one call further on.
        budget_s: a call that has taken this long in total sits out the rounds after its `least`-th.
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
                wall, cpu = time.perf_counter(), time.process_time()
                calls[name]()
                taken.append(Sample(time.perf_counter() - wall, time.process_time() - cpu))
    finally:
        if collecting:
            gc.enable()
    return samples


def median_ms(samples: list[Sample], clock: Clock) -> float:
    """Median milliseconds by a clock; that of the processor leaves out the time that other programs had it."""
    return 1e3 * median(sample.wall_s if clock == "wall" else sample.cpu_s for sample in samples)
