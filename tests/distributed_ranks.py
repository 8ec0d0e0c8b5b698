"""Ranks that live through a test session: processes joined by gloo, to which functions are sent."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

RANKS = 4
TIMEOUT = timedelta(seconds=60)  # long: a rank may wait for a core on a busy machine
NO_ANSWER, ENDED = "no answer", "the process ended"


class RankError(AssertionError):
    """What ranks raised: rank -> traceback, and what the others answered."""

    def __init__(self, errors: dict[int, str], answers: dict[int, Any]) -> None:
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in errors.items()))
        self.errors, self.answers = errors, answers


class Ranks:
    """`count` processes; `run` sends a function of a module to the first ones and returns what each returned."""

    def __init__(self, count: int = RANKS, timeout: timedelta = TIMEOUT) -> None:
        self.count, self.timeout = count, timeout
        self._start()

    def _start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.tensor", "longattn.distributed", "longattn.hf"])
        self.pipes, self.processes = [], []
        for rank in range(self.count):
            here, there = context.Pipe()
            args = (rank, self.count, self.timeout, str(Path(self.folder.name) / "store"), there, list(sys.path))
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(
        self, ranks: int, function: Callable[..., Any], *args: Any, seconds: float = 180.0, **more: Any
    ) -> list[Any]:
        """Call function(group, *args, **more) on the first `ranks` ranks, joined to `group`.

        Ranks that did not answer, or whose connections broke, are replaced: later calls must not meet what is left of
        this one.

        Raises:
            RankError: a rank raised, ended, or did not answer in time.
        """
        for pipe in self.pipes[:ranks]:
            with contextlib.suppress(BrokenPipeError):
                pipe.send((ranks, function, args, more))
        answers: dict[int, Any] = {}
        errors: dict[int, str] = {}
        open_pipes = dict(zip(self.pipes[:ranks], range(ranks), strict=True))
        while open_pipes:
            ready = wait(list(open_pipes), seconds)
            if not ready:
                errors |= {rank: NO_ANSWER for rank in open_pipes.values()}
                break
            for pipe in ready:
                rank = open_pipes.pop(pipe)  # type: ignore[call-overload]
                try:
                    kind, answer = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    kind, answer = "error", ENDED
                (answers if kind == "value" else errors)[rank] = answer
        if any(text in (NO_ANSWER, ENDED) or "gloo/transport" in text for text in errors.values()):
            self.stop()
            self._start()
        if errors:
            raise RankError(dict(sorted(errors.items())), answers)
        return [answers[rank] for rank in range(ranks)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


def _serve(rank: int, count: int, timeout: timedelta, store: str, pipe: Connection, path: list[str]) -> None:
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timeout)
    groups = {count: dist.group.WORLD}
    for ranks in range(1, count):
        groups[ranks] = dist.new_group(range(ranks), timeout=timeout)
    while True:
        try:
            ranks, function, args, more = pipe.recv()
        except EOFError:
            return
        try:
            answer = "value", function(groups[ranks], *args, **more)
        except BaseException:
            answer = "error", traceback.format_exc()
        pipe.send(answer)
