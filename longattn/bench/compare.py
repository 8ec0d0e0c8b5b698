"""One case: every peer is checked against float64, then those that are right are timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longattn.bench.cases import Case
from longattn.bench.peers import OURS, Attend, Peer
from longattn.bench.reference import NAMES, Results, bounds, dense_results
from longattn.bench.text import first_line
from longattn.bench.timing import Clock, Sample, interleave, median_ms
from longattn.pattern import Pattern

__all__ = ["BACKWARD", "FORWARD", "Entry", "compare"]

FORWARD, BACKWARD = "forward", "forward+backward"


@dataclass
class Entry:
    """What was found of one peer at one case.

    `trouble` says why it was not timed, "" where it was; `errors` are norms of errors over those of the reference,
    `limits` what they may be.
    """

    shape: str
    dtype: str
    work: str
    peer: str
    note: str
    trouble: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    median_ms: float | None = None
    ratio: float | None = None
    gflops: float | None = None


class _Truth:
    """The reference of a case, and what errors it allows; the dense run in the case's dtype only where it decides."""

    def __init__(self, case: Case, inputs: tuple[Tensor, ...]) -> None:
        self.reference: Results = dense_results(case, inputs)
        self._case, self._inputs, self._low = case, inputs, False
        self.limits = bounds(case, self.reference)

    def allows(self, index: int, error: float) -> bool:
        if error > self.limits[index] and not self._low:
            low = dense_results(self._case, self._inputs, dtype=self._case.dtype)
            self.limits, self._low = bounds(self._case, self.reference, low), True
        return error <= self.limits[index]


def _judge(got: Sequence[Tensor], truth: _Truth, entry: Entry) -> None:
    """Note errors of the results, and the first that is out of bounds as trouble."""
    for index, (name, x, ref) in enumerate(zip(NAMES, got, truth.reference, strict=False)):
        norm = float(ref.norm()) or 1.0
        if x.shape != ref.shape:
            entry.trouble = f"wrong: {name} has shape {tuple(x.shape)}, not {tuple(ref.shape)}"
            return
        error = float((x.double() - ref).norm())
        right, limit = truth.allows(index, error), truth.limits[index]
        entry.errors[name], entry.limits[name] = error / norm, limit / norm
        if not right and not entry.trouble:
            entry.trouble = f"wrong: {name}'s error is {error / norm:.1e}, above {limit / norm:.1e}"


def _call(attend: Attend, inputs: tuple[Tensor, ...], work: str) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(*inputs[:3]),)

    def both() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs[3]))

    return forward if work == FORWARD else both


def compare(
    case: Case,
    peers: Sequence[Peer],
    *,
    rounds: int,
    budget_s: float,
    clock: Clock = "wall",
    say: Callable[[str], None] = lambda text: None,
) -> list[Entry]:
    """Check and time the peers at one case.

    Args:
        peers: the first is longattn, which the ratios are over.
        rounds, budget_s: as for `interleave`.
        clock: the one that medians and ratios are by.
        say: told what is done next.

    Returns:
        An entry for each peer and each of forward and forward+backward.
    """
    torch.compiler.reset()
    inputs = case.inputs()
    truths: dict[Pattern, _Truth] = {}
    entries: list[Entry] = []
    ready: dict[str, dict[str, Callable[[], object]]] = {FORWARD: {}, BACKWARD: {}}
    for peer in peers:
        say(f"{case.shape} {case.dtype_name}: checking {peer.name}")
        seen = peer.sees(case.pattern)
        if seen not in truths:
            truths[seen] = _Truth(case.seeing(seen), inputs)
        for entry, call in _try(peer, case, inputs, truths[seen]):
            entries.append(entry)
            if not entry.trouble and call is not None:
                ready[entry.work][peer.name] = call
    del truths
    for work, calls in ready.items():
        say(f"{case.shape} {case.dtype_name}: timing {work}")
        for peer in peers:
            if peer.compiled and peer.name in calls:
                calls[peer.name]()
        samples = interleave(calls, rounds=rounds, budget_s=budget_s)
        _record([entry for entry in entries if entry.work == work], case, samples, clock)
    return entries


def _try(
    peer: Peer, case: Case, inputs: tuple[Tensor, ...], truth: _Truth
) -> list[tuple[Entry, Callable[[], object] | None]]:
    """Run a peer both ways and judge it; whatever it raises becomes an entry's text.

    Backward goes first: where a compiled function fails in it, torch.compile leaves that function to run uncompiled,
    forward too, so what was compiled is dropped and the forward starts afresh.
    """
    tried: list[tuple[Entry, Callable[[], object] | None]] = []
    for work in (BACKWARD, FORWARD):
        entry, call = Entry(case.shape, case.dtype_name, work, peer.name, peer.note), None
        try:
            call = _call(peer.prepare(case), inputs, work)
            _judge(call(), truth, entry)
        except ImportError as error:
            entry.trouble = f"not here: {first_line(error)}"
        except Exception as error:
            entry.trouble = first_line(error)
            torch.compiler.reset()
        tried.insert(0, (entry, call))
    return tried


def _record(entries: list[Entry], case: Case, samples: dict[str, list[Sample]], clock: Clock) -> None:
    """Put times into the entries; ratios are over longattn's median."""
    medians = {name: median_ms(taken, clock) for name, taken in samples.items()}
    for entry in entries:
        if entry.peer not in medians:
            continue
        entry.samples, entry.median_ms = samples[entry.peer], medians[entry.peer]
        if OURS in medians:
            entry.ratio = entry.median_ms / medians[OURS]
        flops = case.flops * (1.0 if entry.work == FORWARD else 3.5)
        entry.gflops = flops / (1e6 * entry.median_ms)
