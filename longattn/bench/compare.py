"""One case: every peer is checked against float64, then those that are right are timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from longattn.bench.cases import Case
from longattn.bench.peers import OURS, Attend, Peer
from longattn.bench.reference import NAMES, Pairs, Results, bounds, dense_results, picked
from longattn.bench.text import first_line
from longattn.bench.timing import Call, Clock, Sample, host_sample, interleave, median_ms
from longattn.pattern import Pattern

__all__ = ["BACKWARD", "BOTH", "FORWARD", "Entry", "Method", "compare"]

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
FLOPS = {FORWARD: 1.0, BACKWARD: 2.5, BOTH: 3.5}  # over those of the forward


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


@dataclass(frozen=True)
class Method:
    """How cases are measured.

    Args:
        rounds, budget_s: as for `interleave`.
        clock: the one that medians and ratios are by.
        works: what is timed. A backward alone starts from an output that is made before.
        sets: copies of the inputs with other values, which calls take in turns.
        token_major: whether tensors lie in (B, S, H, D) memory.
        rows: (batch row, key head) pairs that results are checked at; all where None.
        take: times one call.
        wrap: made of every call before it is timed, such as the replay of a graph.
        say: told what is done next.
    """

    rounds: int
    budget_s: float
    clock: Clock = "wall"
    works: tuple[str, ...] = (FORWARD, BOTH)
    sets: int = 1
    token_major: bool = False
    rows: Pairs | None = None
    take: Callable[[Call], Sample] = host_sample
    wrap: Callable[[Call], Call] = lambda call: call
    say: Callable[[str], None] = lambda text: None


class _Truth:
    """The reference of a case, and what errors it allows; the dense run in the case's dtype only where it decides."""

    def __init__(self, case: Case, inputs: tuple[Tensor, ...], rows: Pairs | None) -> None:
        self.reference: Results = dense_results(case, inputs, rows=rows)
        self._case, self._inputs, self._rows, self._low = case, inputs, rows, False
        self.limits = bounds(case, self.reference)

    def allows(self, index: int, error: float) -> bool:
        if error > self.limits[index] and not self._low:
            low = dense_results(self._case, self._inputs, dtype=self._case.dtype, rows=self._rows)
            self.limits, self._low = bounds(self._case, self.reference, low), True
        return error <= self.limits[index]

    def judge(self, got: Sequence[Tensor], entry: Entry) -> None:
        """Note errors of the results, and the first that is out of bounds as trouble."""
        shapes = [x.shape for x in (self._inputs[0], *self._inputs[:3])]
        for index, (name, x, ref) in enumerate(zip(NAMES, got, self.reference, strict=False)):
            norm = float(ref.norm()) or 1.0
            if x.shape != shapes[index]:
                entry.trouble = f"wrong: {name} has shape {tuple(x.shape)}, not {tuple(shapes[index])}"
                return
            error = float((picked(x, self._case, self._rows).double() - ref).norm())
            right, limit = self.allows(index, error), self.limits[index]
            entry.errors[name], entry.limits[name] = error / norm, limit / norm
            if not right and not entry.trouble:
                entry.trouble = f"wrong: {name}'s error is {error / norm:.1e}, above {limit / norm:.1e}"


def _call(attend: Attend, sets: Sequence[tuple[Tensor, ...]], work: str) -> Callable[[], tuple[Tensor, ...]]:
    """One piece of work, of the next set of inputs at each call."""
    leaves = [[x.detach().requires_grad_() for x in inputs[:3]] for inputs in sets]
    outs = [attend(*each) for each in leaves] if work == BACKWARD else []
    turn = count()

    def call() -> tuple[Tensor, ...]:
        at = next(turn) % len(sets)
        if work == FORWARD:
            with torch.no_grad():
                return (attend(*sets[at][:3]),)
        out = outs[at] if work == BACKWARD else attend(*leaves[at])
        return (out.detach(), *torch.autograd.grad(out, leaves[at], sets[at][3], retain_graph=work == BACKWARD))

    return call


def compare(case: Case, peers: Sequence[Peer], method: Method) -> list[Entry]:
    """Check and time the peers at one case.

    Args:
        peers: the first is longattn, which the ratios are over.

    Returns:
        An entry for each peer and each work.
    """
    torch.compiler.reset()
    sets = [case.inputs(seed, token_major=method.token_major) for seed in range(method.sets)]
    truths: dict[Pattern, _Truth] = {}
    entries: list[Entry] = []
    ready: dict[str, dict[str, Call]] = {work: {} for work in method.works}
    for peer in peers:
        method.say(f"{case.shape} {case.dtype_name}: checking {peer.name}")
        seen = peer.sees(case.pattern)
        if seen not in truths:
            truths[seen] = _Truth(case.seeing(seen), sets[0], method.rows)
        for entry, call in _try(peer, case, sets, truths[seen], method):
            entries.append(entry)
            if not entry.trouble and call is not None:
                ready[entry.work][peer.name] = call
    del truths
    for work, calls in ready.items():
        method.say(f"{case.shape} {case.dtype_name}: timing {work}")
        for peer in peers:
            if peer.compiled and peer.name in calls:
                calls[peer.name]()
        samples = interleave(calls, rounds=method.rounds, budget_s=method.budget_s, take=method.take)
        _record([entry for entry in entries if entry.work == work], case, samples, method.clock)
    return entries


def _try(
    peer: Peer, case: Case, sets: Sequence[tuple[Tensor, ...]], truth: _Truth, method: Method
) -> list[tuple[Entry, Call | None]]:
    """Run a peer at every work and judge it; whatever it raises becomes an entry's text.

    Backward goes first: where a compiled function fails in it, torch.compile leaves that function to run uncompiled,
    forward too, so what was compiled is dropped and the forward starts afresh.
    """
    tried: list[tuple[Entry, Call | None]] = []
    for work in reversed(method.works):
        entry, call = Entry(case.shape, case.dtype_name, work, peer.name, peer.note), None
        try:
            run = _call(peer.prepare(case), sets, work)
            truth.judge(run(), entry)
            call = method.wrap(run)
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
        entry.gflops = case.flops * FLOPS[entry.work] / (1e6 * entry.median_ms)
