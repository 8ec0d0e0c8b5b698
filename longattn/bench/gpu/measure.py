"""One cell measured: how often, by which clock, over how many inputs; the ceilings of the card in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from longattn.bench.cases import Case
from longattn.bench.compare import BACKWARD, FORWARD, Method, compare
from longattn.bench.gpu.cells import Cell
from longattn.bench.gpu.peers import FLASH, gpu_peers
from longattn.bench.machine import gpu_state
from longattn.bench.peers import OURS
from longattn.bench.rope import RopeShape, compare_rope
from longattn.bench.timing import Call, DeviceClock, Sample, host_sample, interleave, median_ms

__all__ = ["Bench"]

ROTATED = 240e6  # bytes that inputs go round in: several times the L2 of any card
ROUNDS = 7
GRID_PEERS = (OURS, FLASH, "cuDNN")


@dataclass(frozen=True)
class Bench:
    """Measures cells on a device; the CPU only to show that all of this runs. `compiled` is for peers that compile."""

    device: str
    stage: str
    say: Callable[[str], None]
    compiled: bool = True

    def cell(self, cell: Cell) -> dict[str, Any]:
        """Everything found at one cell, as JSON holds it; clocks and temperature before and after."""
        before = gpu_state(self.device)
        measured = cell.measured
        if isinstance(measured, RopeShape):
            method = self._method(2 * measured.elements, works=(FORWARD, BACKWARD))
            entries: list[Any] = list(compare_rope(measured, torch.bfloat16, method, compiled=self.compiled))
            moved: dict[str, float] = {"bytes": 4.0 * measured.elements}
        else:
            entries = list(compare(measured, self._peers(cell.what, measured), self._attention_method(cell)))
            moved = {"flops": measured.flops, "bytes": _least_bytes(measured)}
        return {
            "what": cell.what,
            **moved,
            "before": before,
            "after": gpu_state(self.device),
            "entries": [asdict(entry) for entry in entries],
        }

    def _peers(self, what: str, case: Case) -> list[Any]:
        peers = [peer for peer in gpu_peers(what, case) if self.compiled or not peer.compiled]
        return peers if self.stage == "core" else [peer for peer in peers if peer.name in GRID_PEERS]

    def _take(self) -> Callable[[Call], Sample]:
        return host_sample if self.device == "cpu" else DeviceClock()

    def _method(self, input_bytes: int, works: tuple[str, ...], **changes: Any) -> Method:
        sets = 1 if self.device == "cpu" else int(ROTATED // input_bytes) + 1
        options: dict[str, Any] = dict(sets=sets, token_major=True, take=self._take(), say=self.say)
        return Method(ROUNDS, budget_s=1e9, works=works, **options, **changes)

    def _attention_method(self, cell: Cell) -> Method:
        case = cell.measured
        assert isinstance(case, Case)
        rows = sorted({(0, 0), (case.batch - 1, case.kv_heads - 1)})
        if cell.what != "decode":
            return self._method(case.grad_bytes, (FORWARD, BACKWARD), rows=rows)
        method = self._method(case.grad_bytes, (FORWARD,), rows=rows)
        return self._replayed(method)

    def _replayed(self, method: Method) -> Method:
        """The same, each sample the replay of a graph that goes through all sets once."""
        sets, take = method.sets, method.take

        def wrap(call: Call) -> Call:
            return replay_of(lambda: [call() for _ in range(sets)], self.device)

        def take_one(call: Call) -> Sample:
            whole = take(call)
            return Sample(whole.wall_s / sets, whole.cpu_s / sets)

        options: dict[str, Any] = dict(sets=sets, token_major=True, rows=method.rows, say=method.say)
        return Method(method.rounds, method.budget_s, works=method.works, take=take_one, wrap=wrap, **options)

    def ceilings(self) -> dict[str, float]:
        """Rates that no kernel beats: copied bytes (read and written), read bytes, products; a second, in 1e9."""
        big = self.device != "cpu"
        source = torch.randn(1 << 29 if big else 1 << 18, device=self.device)
        target = torch.empty_like(source)
        size = 8192 if big else 128
        left, right = torch.randn(2, size, size, device=self.device).bfloat16()
        calls: dict[str, Call] = {
            "copy GB/s": lambda: target.copy_(source),
            "read GB/s": lambda: source.sum(),
            "matmul bfloat16 GFLOP/s": lambda: left @ right,
        }
        for call in calls.values():
            call()
        samples = interleave(calls, rounds=ROUNDS, budget_s=1e9, take=self._take())
        work = {"copy GB/s": 8.0 * source.numel(), "read GB/s": 4.0 * source.numel()}
        work["matmul bfloat16 GFLOP/s"] = 2.0 * size**3
        return {name: work[name] / (1e6 * median_ms(taken, "wall")) for name, taken in samples.items()}


def _least_bytes(case: Case) -> float:
    """What a forward reads and writes at least: queries and output, and the keys and values that any query sees."""
    kv_bytes = float(case.grad_bytes - case.output_bytes)
    if case.num_queries == 1:
        seen = case.pattern.visible(case.tokens) - case.pattern.visible(case.tokens - 1)
        kv_bytes *= seen / case.tokens
    return 2 * case.output_bytes + kv_bytes


def replay_of(call: Call, device: str) -> Call:
    """A CUDA graph of the call; on a CPU the call itself."""
    if device == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()  # the graph writes into these

    def replay() -> object:
        graph.replay()
        return kept

    return replay
