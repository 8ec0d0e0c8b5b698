"""The demo's course: which rows there are, on how many processes they run, and what is written where."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import transformers

import longattn
from longattn.demo import MODEL_FOLDER
from longattn.demo.findings import findings
from longattn.demo.methods import ROPE_METHODS, Change, attention_changes, everything_change, rope_changes
from longattn.demo.results import Everything, Results, Row
from longattn.demo.row import EVALUATION_WORK, Bench, Progress

__all__ = ["Settings", "run_demo"]

RESULTS_FILE = "results.json"
MAX_WORKERS = 4  # each holds torch, transformers and a copy of the text, about 0.7 GB


@dataclass(frozen=True)
class Settings:
    """How much of the demo to run; the numbers measured depend on these, and not on the workers.

    Args:
        methods: rope methods to try, of `methods.ROPE_METHODS`.
        factor: how many times longer the context becomes.
        windows: pieces of held-out text to score.
        tune_steps: optimizer steps of a fine-tune.
        tune_batch: windows of the new length in a step.
        tune_chars: characters of the trained text that those windows are drawn from.
        new_tokens: tokens to generate.
        seed: of the windows drawn.
    """

    methods: Sequence[str] = field(default=ROPE_METHODS)
    factor: int = 4
    windows: int = 24
    tune_steps: int = 30
    tune_batch: int = 4
    tune_chars: int = 2_000_000
    new_tokens: int = 96
    seed: int = 0

    def changes(self, length: int) -> list[Change]:
        """The rows of the tables, for a model of `length` tokens; that with all parts comes last."""
        changes = [*rope_changes(self.methods, length, self.factor), *attention_changes(length, self.factor)]
        return [*changes, everything_change(length, self.factor)]

    def work(self) -> float:
        """What `run_demo` will report to its `progress`, in all."""
        return sum(
            EVALUATION_WORK + change.tuned * (self.tune_steps + EVALUATION_WORK) for change in self.changes(length=2)
        )


def run_demo(
    out: Path,
    settings: Settings,
    *,
    workers: int | None = None,
    progress: Progress = lambda doing, work: None,
) -> Results:
    """Run the demo, and write its checkpoints to `out`/checkpoints and its numbers to `out`/results.json.

    It starts processes that import the calling program's main module, so a script calls it under
    `if __name__ == "__main__"`.

    Args:
        out: a new or empty folder, or one that an earlier run wrote.
        settings: how much to run.
        workers: processes that share the rows, each on one thread; by default one a core, at most four. So no thread
            waits for another on a busy machine, and the numbers don't depend on how many cores there are.
        progress: called with what was done and how much work that was, of `settings.work()` in all.

    Raises:
        ValueError: `out` holds other things, or there is no text to read.
    """
    started = time.perf_counter()
    checkpoints = _prepare(out)
    shutil.copytree(MODEL_FOLDER, checkpoints / "original")
    length = json.loads((MODEL_FOLDER / "config.json").read_text())["max_position_embeddings"]
    changes = settings.changes(length)
    # the longest goes first, so that none is left to run alone for long
    order = [changes[-1], *changes[:-1]]
    done = _in_processes(checkpoints, settings, order, workers or min(_cores(), MAX_WORKERS), progress)
    everything = next(one for one in done if isinstance(one, Everything))
    rows = [one for one in done if isinstance(one, Row)]
    results = Results(
        settings=asdict(settings),
        versions=_versions(),
        length=length,
        contexts=list(everything.row.zero_shot),
        num_windows=everything.num_windows,
        rows=[*rows, everything.row],
        tokens=everything.tokens,
        continuations=everything.continuations,
        report=everything.report,
    )
    results.findings = findings(results)
    results.seconds = round(time.perf_counter() - started, 1)
    _write(out, {"complete": True, **results.to_dict()})
    return results


def _in_processes(
    checkpoints: Path, settings: Settings, order: list[Change], workers: int, progress: Progress
) -> list[Row | Everything]:
    """Run the rows on processes that each read the text once, and pass on what they report."""
    context = get_context("spawn")  # a fork of a process that has used torch's threads may hang
    reports = context.Queue()
    with ProcessPoolExecutor(workers, context, _start_worker, (checkpoints, settings, reports)) as pool:
        futures = [pool.submit(_run_in_worker, change) for change in order]
        try:
            pending = set(futures)
            while pending:
                for doing, work in _waiting(reports):
                    progress(doing, work)
                done, pending = wait(pending, timeout=0.2)
                for future in done:
                    future.result()  # an error ends the run at once
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    # a process hands over the last of its reports as it ends
    for doing, work in _waiting(reports):
        progress(doing, work)
    return [future.result() for future in futures]


def _waiting(reports: Any) -> Iterator[tuple[str, float]]:
    while True:
        try:
            yield reports.get_nowait()
        except Empty:
            return


_worker: dict[str, Any] = {}  # of this process: what it was started with, and the bench that its first row builds


def _start_worker(checkpoints: Path, settings: Settings, reports: Any) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    _worker["arguments"] = (checkpoints, settings, lambda doing, work: reports.put((doing, work)))


def _run_in_worker(change: Change) -> Row | Everything:
    if "bench" not in _worker:  # here, and not at the start, where an error would not reach the caller
        _worker["bench"] = Bench(*_worker["arguments"])
    return _worker["bench"].run(change)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _prepare(out: Path) -> Path:
    """Make `out`, or empty what an earlier run wrote there; anything else in it is left alone by refusing."""
    checkpoints = out / "checkpoints"
    if out.exists():
        if not out.is_dir():
            raise ValueError(f"demo: --out must be a folder, got the file {out}")
        if any(out.iterdir()) and not (out / RESULTS_FILE).is_file():
            raise ValueError(f"demo: --out must be new, empty, or written by an earlier demo, got {out}")
        shutil.rmtree(checkpoints, ignore_errors=True)
    checkpoints.mkdir(parents=True)
    _write(out, {"complete": False})
    return checkpoints


def _write(out: Path, content: dict[str, Any]) -> None:
    (out / RESULTS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "longattn": longattn.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
