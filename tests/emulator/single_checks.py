"""The backward of one pass in the emulator: builds, what it serves of a drawn case, and bugs planted into it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from emulator.attention import Call, Emulated
from emulator.build import ROOT, plant
from emulator.checks import check, qkv
from emulator.hopper_checks import build_hopper
from emulator.planted import THREAD

HEAD_DIM = 64


def build_single(folder: Path, *flags: str, csrc: Path = ROOT / "csrc") -> Emulated:
    """The driver of head dim 64 whose backward takes one pass wherever that can serve."""
    emulated = build_hopper(folder, *flags, head_dim=HEAD_DIM, backward=True, csrc=csrc)
    emulated.environment["LONGATTN_HOPPER_BACKWARD"] = "one"
    emulated.multiprocessors = 3
    return emulated


def served(case):
    """A case of test_emulated_attention.cases without what takes two passes: sinks, and caches with an end."""
    shape, call, sink_logits, rows = case
    return shape, replace(call, sinks=0), sink_logits, {name: row for name, row in rows.items() if name != "kv_end"}


@dataclass(frozen=True)
class SingleBug:
    file: str
    before: str
    after: str
    noticed: str
    sanitizer: str = ""


SINGLE, TURNS = "window_attn_bwd_single_sm90.cuh", "window_attn_bwd_turns.h"
BUGS = {
    "sums read before all turns are done": SingleBug(
        SINGLE, "simt::wait_for_flag(p.flags + place, mark);", "", "NaN|exceeds"
    ),
}  # fmt: skip
MORE_BUGS = {
    "the first turn adds to what was there": SingleBug(
        SINGLE, "simt::store_floats<false>(to", "simt::store_floats<true>(to", "NaN"
    ),
    "a turn passed on before its sum is there": SingleBug(
        SINGLE, "simt::store_floats_wait<kPending>();", "", "NaN|exceeds|in flight"
    ),
    "no fence behind dS": SingleBug(
        SINGLE, "simt::wgmma_commit();\n    simt::fence_async_proxy();", "simt::wgmma_commit();", "no fence has made"
    ),
    "a turn that is not waited for": SingleBug(
        SINGLE, "settle<0>();\n        simt::wait_for_flag(p.flags + place, turns.mark_before());", "settle<0>();",
        "data race|exceeds|NaN|deadlock", THREAD,
    ),
    "the mark of another turn": SingleBug(TURNS, "return tile + 2;", "return tile + 1;", "deadlock"),
    "no last turn": SingleBug(TURNS, "return !earlier.holds(query_tile);", "return query_tile < 0;", "NaN"),
    "dS written over while it is multiplied": SingleBug(
        SINGLE, "      wait_for_room();\n      leave_weights();", "      leave_weights();",
        "data race|arrivals|exceeds|deadlock", THREAD,
    ),
    "tiles left out without waiting for room": SingleBug(
        SINGLE, "this->skip();\n    wait_for_room();", "this->skip();", "arrivals|deadlock|exceeds|NaN|data race",
        THREAD,
    ),
    "the wrong parity of dS": SingleBug(
        SINGLE, "(shared.own_barrier(Shared::kWeightsFree, stage.stage), stage.parity ^ 1)",
        "(shared.own_barrier(Shared::kWeightsFree, stage.stage), stage.parity)", "deadlock",
    ),
    "dS multiplied before it is there": SingleBug(
        SINGLE, "simt::mbarrier_wait(shared.own_barrier(Shared::kWeightsFull, weights.stage), weights.parity);", "",
        "NaN|exceeds|no fence|arrivals|deadlock",
    ),
    "no fence behind a part of a sum": SingleBug(
        SINGLE, "simt::fence_async_proxy();\n    arrive(shared.own_barrier(Shared::kSumsFull",
        "arrive(shared.own_barrier(Shared::kSumsFull", "no fence has made",
    ),
    "a part of a sum copied before it is there": SingleBug(
        SINGLE, "simt::mbarrier_wait(full, stage.parity);", "", "NaN|exceeds|no fence|arrivals|deadlock"
    ),
    "a part of a sum written over while it is copied": SingleBug(
        SINGLE, "simt::mbarrier_wait(shared.own_barrier(Shared::kSumsFree, stage.stage), stage.parity ^ 1);", "",
        "data race|arrivals|exceeds|no fence", THREAD,
    ),
    "no fence between a flag and what is added": SingleBug(
        SINGLE, "simt::fence_async_proxy_global();\n      simt::store_floats", "simt::store_floats", "no fence has made"
    ),
    "no fence between a sum and its flag": SingleBug(
        SINGLE, "simt::fence_async_proxy_global();\n    simt::raise_flag", "simt::raise_flag", "no fence has made"
    ),
    "dK staged over K that is multiplied": SingleBug(
        SINGLE, "simt::mbarrier_wait(shared.own_barrier(Shared::kKeysRead, read.stage), read.parity);", "",
        "data race|exceeds", THREAD,
    ),
    "dQ staged over dQ that leaves": SingleBug(
        SINGLE, "if (leaves && is_first_thread()) simt::store_wait_read();\n    simt::sync_warpgroups",
        "simt::sync_warpgroups", "data race|exceeds", THREAD,
    ),
    "dQ stored before all have staged it": SingleBug(
        SINGLE, "simt::sync_warpgroups<1>(kBarrier);  // all is staged", "", "no fence has made|data race", THREAD
    ),
    "dQ staged before there is room": SingleBug(
        SINGLE, "simt::sync_warpgroups<1>(kBarrier);  // there is room", "", "data race", THREAD
    ),
    "a plan changed while it is followed": SingleBug(
        SINGLE, "Base::init_barriers(4 + 1);", "Base::init_barriers(4);", "data race|arrivals|exceeds|deadlock", THREAD
    ),
    "queries without keys left as they are": SingleBug(
        SINGLE, "store_zeros(plan.place, turns.unmet_behind());", "", "NaN"
    ),
    "queries before all keys left as they are": SingleBug(
        SINGLE, "store_zeros(plan.place, turns.unmet_before());", "", "NaN"
    ),
    "a warpgroup's K left out": SingleBug(SINGLE, "+ 2 * runs[1].holds(t)", "", "exceeds"),
    "dS as if keys were contiguous": SingleBug(
        SINGLE, "matrix % 2 * 8 + line) * Traits::kRowBytes", "matrix / 2 * 8 + line) * Traits::kRowBytes",
        "exceeds|NaN|no fence",
    ),
}  # fmt: skip


def check_all(emulated: Emulated, seed: int) -> None:
    """Calls that have every kind of turn: several blocks, packed and other heads, queries without keys at both ends."""
    check(emulated, *qkv(1, 4, 2, 300, 330, HEAD_DIM), Call(window=(130, 3)), seed=seed)
    check(emulated, *qkv(1, 1, 1, 330, 330, HEAD_DIM), Call(window=(-1, 0)), seed=seed)
    check(emulated, *qkv(1, 1, 1, 330, 150, HEAD_DIM), Call(window=(9, 0), query_start=100, key_start=200), seed=seed)
    assert not emulated.output, emulated.output


def check_is_noticed(bug: SingleBug, folder: Path) -> None:
    """Plant a bug, and see some schedule fail as it should."""
    csrc = plant(folder, bug.file, bug.before, bug.after)
    flags = ("-O1", "-g", "-w", "-DLONGATTN_ONLY_BF16", *([bug.sanitizer] if bug.sanitizer else []))
    emulated = build_single(folder, *flags, csrc=csrc)
    with pytest.raises(AssertionError, match=bug.noticed):
        for seed in range(8):
            emulated.multiprocessors = 3 - seed % 3  # with one block, plans lie where others did
            check_all(emulated, seed)


def gradients(emulated: Emulated, call: Call, shape: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    """Gradients of one backward with fixed inputs."""
    inputs = qkv(*shape, HEAD_DIM)
    saved = emulated.forward(*inputs, call)
    grad_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(7)).to(inputs[0].dtype)
    return emulated.backward(grad_out, None, inputs, saved, call, seed=seed)
