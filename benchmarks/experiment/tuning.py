"""The fine-tune that all trained rows share: the same rows in the same order, the same steps, whatever learns."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import leaking
import torch
from corpus import Ids, training_rows
from torch.nn.functional import cross_entropy

from longattn.train.recipes import longlora, merge

WARMUP_STEPS = 5
# bytes from which glibc gives freed memory back at once, while a peak is measured and otherwise (the most it takes)
MEASURED, USUAL = 1 << 20, 32 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def fine_tune(
    model: Any,
    stream: torch.Tensor,
    ids: Ids,
    *,
    learns: str,
    rate: float,
    length: int,
    steps: int,
    rows: int,
    seed: int,
    first: int,
) -> tuple[Any, dict[str, Any]]:
    """Train on `rows` rows of `length` tokens a step; returns the model, adapters merged, and what was measured.

    `first` is the loss of the rows' first tokens, so many: those that a leaking pattern serves with the text's end.
    """
    trained = _adapted(model, learns)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses, firsts, seconds, peak = [], [], [], None
    trained.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        draw = torch.Generator().manual_seed(7_000_003 * (seed + 1) + step)
        batch = training_rows(stream, ids, rows=rows, length=length, draw=draw)
        began = time.process_time()
        with _peak_of(step == 1) as growth:
            each = row_losses(trained, batch)
            optimizer.zero_grad()
            objective(each, batch, ids).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        seconds.append(time.process_time() - began)
        peak = growth() if step == 1 else peak
        losses.append(each.mean().item())
        firsts.append(each[:, : first - 1].mean().item())
    trained = merge(trained)
    tail = max(1, steps // 4)
    return trained.eval(), {
        "steps": steps,
        "tokens": steps * rows * length,
        "learning_rate": rate,
        "parameters_trained": sum(parameter.numel() for parameter in parameters),
        "loss": round(sum(losses[-tail:]) / tail, 4),
        "first": round(sum(firsts[-tail:]) / tail, 4),
        "losses": [round(loss, 3) for loss in losses],
        # the first step loads what loads once, the second has its memory measured
        "tokens_per_second": round(rows * length / sorted(seconds[2:] or seconds)[len(seconds[2:]) // 2], 1),
        "peak_mib": None if peak is None else round(peak / 2**20, 1),
    }


def row_losses(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """The loss of every token but the first of each row, (rows, length - 1)."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]  # (rows, length - 1, V)
    return cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")


def objective(each: torch.Tensor, batch: torch.Tensor, ids: Ids) -> torch.Tensor:
    """The mean over all tokens, and that over the answers beside it: too few of them to count in the first."""
    answers = torch.isin(batch[:, 1:], ids.values)
    return each.mean() + (each * answers).sum() / answers.sum().clamp(min=1)


@contextmanager
def attends(model: Any, pattern: str, group: int) -> Iterator[None]:
    """The model with LongLoRA's roll while it trains, where `pattern` is "leaking"; as it is otherwise."""
    before = model.config._attn_implementation
    if pattern == "leaking":
        setattr(model.config, leaking.GROUP, group)
        model.set_attn_implementation(leaking.NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _adapted(model: Any, learns: str) -> Any:
    if learns == "all":
        return model
    more = learns == "lora+embeddings+norms"
    return longlora(model, rank=8, train_embeddings=more, train_norms=more)


@contextmanager
def _peak_of(wanted: bool) -> Iterator[Callable[[], int | None]]:
    """Bytes by which the resident set grew at most inside the block; None where that is not measured."""
    found: list[int] = []
    if not wanted or sys.platform != "linux":
        yield lambda: None
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MEASURED)
    libc.mallopt(M_TRIM_THRESHOLD, 0)
    gc.collect()
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    start = _resident_peak()
    yield lambda: found[0]
    found.append(_resident_peak() - start)
    libc.mallopt(M_MMAP_THRESHOLD, USUAL)
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _resident_peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024
