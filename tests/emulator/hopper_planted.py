"""Bugs planted into the kernels for compute capability 9.0: what each part of their synchronisation is there for."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulator.attention import Call
from emulator.build import ROOT
from emulator.checks import check, qkv
from emulator.hopper_checks import build_hopper, check_forward
from emulator.planted import THREAD, Bug


@dataclass(frozen=True)
class HopperBug(Bug):
    head_dim: int = 64  # 192: one slot of Q rather than two
    backward: bool = False
    kv_end: int | None = None


KERNEL, PLAN, RING = "window_attn_fwd_sm90.cuh", "window_attn_plan_sm90.cuh", "window_attn_ring_sm90.cuh"
GRADIENTS, QUERIES = "window_attn_bwd_tile_sm90.cuh", "window_attn_bwd_query_sm90.cuh"
LAUNCH, KEYS = "window_attn_fwd_sm90.cu", "window_attn_bwd_key_sm90.cuh"
# One bug for each kind of check.
BUGS = {
    "K waited for behind the issue of its product": Bug(
        KERNEL, "wait_for(0, ring);\n    simt::wgmma_fence();\n    multiply_columns<Traits>(rows.s, query, "
        "this->columns(0, ring));", "simt::wgmma_fence();\n    multiply_columns<Traits>(rows.s, query, "
        "this->columns(0, ring));\n    wait_for(0, ring);", "changed in flight",
    ),
    "the wrong parity": Bug(
        RING, "(shared.free(which, ring.stage), ring.parity ^ 1)", "(shared.free(which, ring.stage), ring.parity)",
        "deadlock",
    ),
    "V passed on before it is multiplied": Bug(
        KERNEL, "simt::wgmma_wait<0>(rows.out);\n    if (multiplied) release(1, ring.back(2));",
        "if (multiplied) release(1, ring.back(2));\n    simt::wgmma_wait<0>(rows.out);", "data race", THREAD,
    ),
}  # fmt: skip
MORE_BUGS = {
    "K multiplied before it is there": Bug(
        KERNEL, "wait_for(0, ring);\n    simt::wgmma_fence();", "simt::wgmma_fence();", "changed in flight|arrivals"
    ),
    "V multiplied before it is there": Bug(
        KERNEL, "wait_for(1, at);\n    simt::wgmma_fence();", "simt::wgmma_fence();", "NaN|arrivals"
    ),
    "Q multiplied before it is there": Bug(
        RING, "simt::mbarrier_wait(shared.barrier(Shared::kRowsFull + slot(wave)), "
        "place_in_ring<Traits::kSlots>(wave).parity);", "", "NaN|changed in flight",
    ),
    "K copied over while it is read": Bug(
        RING, "simt::mbarrier_wait(shared.free(which, ring.stage), ring.parity ^ 1);", "",
        "NaN|exceeds|arrivals|deadlock",
    ),
    "the steps of K too short": Bug(RING, "c % kSteps * 32", "c % kSteps * 16", "exceeds"),
    "the steps of V too short": Bug(
        RING, "n * 16 * Traits::kRowBytes", "n * 8 * Traits::kRowBytes", "exceeds"
    ),
    "too few bytes expected": Bug(
        RING, "mbarrier_arrive_expect(whole ? full : aside, Traits::kColumnTile)",
        "mbarrier_arrive_expect(whole ? full : aside, Traits::kColumnTile / 2)", "NaN|exceeds|arrivals|deadlock",
    ),
    "weights replaced while they are multiplied": Bug(
        KERNEL, "simt::wgmma_wait<0>(rows.out);\n    if (multiplied)", "if (multiplied)", "NaN|exceeds|flight|fence"
    ),
    "sums read while they are formed": Bug(
        KERNEL, "issue_keys(query);\n      simt::wgmma_wait<0>(rows.s);", "issue_keys(query);", "NaN|written in flight"
    ),
    "no fence before a product": Bug(
        KERNEL, "wait_for(0, ring);\n    simt::wgmma_fence();", "wait_for(0, ring);",
        "wgmma.fence",
    ),
    "tiles left out but not passed on": Bug(
        RING, "__syncwarp();\n    release(0, ring);", "__syncwarp();", "deadlock",
    ),
    "too few warps pass a stage on": Bug(
        RING, "init(kStreamFull, kStages, 1, 4 * kConsumers);", "init(kStreamFull, kStages, 1, 4 * kConsumers - 4);",
        "data race|arrivals|deadlock", THREAD,
    ),
    "the output stored before all have staged it": Bug(
        RING, "simt::sync_warpgroups<1>(1 + group);  // the whole output is staged", "", "no fence has made|data race",
        THREAD,
    ),
    "the output staged over Q that is read": Bug(
        RING, "simt::sync_warpgroups<1>(1 + group);  // all have multiplied the rows, which are written over", ";",
        "data race", THREAD,
    ),
    "no fence before the output is stored": Bug(
        RING, "simt::fence_async_proxy();\n    simt::sync_warpgroups", "simt::sync_warpgroups", "no fence has made"
    ),
    "a slot filled while its output is read": Bug(
        RING, "simt::store_wait_read();\n      simt::mbarrier_arrive", "simt::mbarrier_arrive",
        "data race|NaN|exceeds", THREAD,
    ),
    "a plan changed while it is followed": Bug(
        PLAN, "simt::mbarrier_wait(shared.barrier(Shared::kPlanFree + plans.stage), plans.parity ^ 1);", "",
        "data race", THREAD,
    ),
    "no mask at the edges": Bug(RING, "interior.holds(t)", "interior.holds(t) || true", "exceeds"),
    "a warpgroup without rows that is not waited for": HopperBug(
        RING, "waited for in vain.\n    simt::sync_warpgroups<1>(1 + group);", "", "deadlock", head_dim=192,
    ),
    "dO multiplied before it is there": HopperBug(
        GRADIENTS, "wait_for(1, ring);\n      simt::wgmma_fence();", "simt::wgmma_fence();", "NaN|exceeds|arrivals",
        backward=True,
    ),
    "logits read while they are formed": HopperBug(
        GRADIENTS, "simt::wgmma_wait<0>(s, dp);", ";", "NaN|flight|fence|exceeds", backward=True
    ),
    "columns passed on before they are multiplied": HopperBug(
        GRADIENTS, "simt::wgmma_wait<0>(sum[0], sum[kSums - 1]);\n    __syncwarp();  "
        "// all lanes have read the columns' statistics\n    if constexpr (kPassedOnEarly != 0) release(0, ring);",
        "release(0, ring);\n    simt::wgmma_wait<0>(sum[0], sum[kSums - 1]);", "data race", THREAD, backward=True,
    ),
    "statistics passed on before all lanes have read them": HopperBug(
        GRADIENTS, "__syncwarp();  // all lanes have read the columns' statistics", "", "data race", THREAD,
        backward=True,
    ),
    "statistics written over while they are read": HopperBug(
        KEYS, "simt::mbarrier_wait(shared.free(1, ring.stage), ring.parity ^ 1);", "", "data race|arrivals|exceeds",
        THREAD, backward=True,
    ),
    "statistics that nobody waits for": HopperBug(
        RING, "init(kStreamFull + 2 * kStages, kStages, 1 + kStatsWarps, 4 * kConsumers);",
        "init(kStreamFull + 2 * kStages, kStages, 1, 4 * kConsumers);", "arrivals|data race|exceeds|NaN", THREAD,
        backward=True,
    ),
    "a plan changed while its statistics are brought": HopperBug(
        RING, "4 * kConsumers + 1 + kStatsWarps + more_readers);", "4 * kConsumers + 1 + more_readers);",
        "data race|arrivals|deadlock|exceeds", THREAD, backward=True,
    ),
    "no mask at the edges of gradients": HopperBug(
        RING, "interior.holds(t)", "interior.holds(t) || true", "exceeds", backward=True
    ),
    "gradients without sums of sinks": HopperBug(
        KEYS, "if (kSinks && p.sink_chunks > 0) add_sink_sums(plan, half);", "", "exceeds", backward=True
    ),
    "columns of packed heads taken for queries": HopperBug(
        KEYS, "64) << p.packed_bits;", "64);", "exceeds", backward=True
    ),
    "the output staged over rows that the other warpgroup reads": HopperBug(
        RING, "simt::sync_warpgroups<Traits::kConsumers>(1 + Traits::kConsumers);", ";", "data race", THREAD,
        head_dim=192, backward=True,
    ),
    "rows copied over once one of two warpgroups is done": HopperBug(
        RING, "init(kRowsFull, kRowSlots, 1, kConsumers / Traits::kRowGroups);",
        "init(kRowsFull, kRowSlots, 1, 1);", "deadlock|data race|arrivals|NaN|exceeds", THREAD,
        head_dim=192, backward=True,
    ),
    "P formed before the statistics are there": HopperBug(
        GRADIENTS, "if constexpr (!kOfLogits) wait_for(1, ring);", "", "data race|NaN|exceeds|arrivals", THREAD,
        head_dim=192, backward=True,
    ),
    "dO passed on while its statistics are read": HopperBug(
        GRADIENTS, "kOfValues || Plan::kColumnStats ? -1 : 1", "kOfValues ? -1 : 1", "data race|exceeds", THREAD,
        head_dim=192, backward=True,
    ),
    "V's panels taken for as long as those of rows": HopperBug(
        RING, "Operand(shared.base + Shared::streamed(which, at.stage), Traits::kColumnPanel)",
        "Operand(shared.base + Shared::streamed(which, at.stage), Traits::kRowPanel)", "exceeds|NaN",
        head_dim=256, backward=True,
    ),
    "dQ of dP alone": HopperBug(
        GRADIENTS, "ds[i] = p_of[i] * (dp[4 * block + 2 * half + i] - own.delta)",
        "ds[i] = p_of[i] * dp[4 * block + 2 * half + i]", "exceeds", backward=True,
    ),
}  # fmt: skip
# Bugs that give the right results here unless the emulator looks for them, but not on a device.
STRICT_BUGS = {
    "sums cleared behind the fence": Bug(
        KERNEL, "simt::wgmma_fence();\n    multiply_columns", "simt::wgmma_fence();\n    for (float& x : rows.s) "
        "x = 0.0f;\n    multiply_columns", "written since the last wgmma.fence",
    ),
    "sums cleared while they are formed": Bug(
        KERNEL, "issue_keys(query);\n      simt::wgmma_wait<0>(rows.s);",
        "issue_keys(query);\n      for (float& x : rows.s) x = 0.0f;\n      simt::wgmma_wait<0>(rows.s);",
        "sums were written in flight",
    ),
    "weights formed while they are multiplied": HopperBug(
        GRADIENTS, """    simt::wgmma_fence();
#pragma unroll
    for (int which = 0; which < kSums; ++which)
      multiply_weights<Traits>(sum[which], weights[which], this->weighted(kOfLogits ? which : 1, ring));
""", """    weights[0][0][0] = ~weights[0][0][0];
    simt::wgmma_fence();
    for (int which = 0; which < kSums; ++which)
      multiply_weights<Traits>(sum[which], weights[which], this->weighted(kOfLogits ? which : 1, ring));
    weights[0][0][0] = ~weights[0][0][0];
""", "an operand in registers changed in flight", backward=True,
    ),
    "the output staged behind its fence": Bug(
        RING, "stage();\n    simt::fence_async_proxy();", "simt::fence_async_proxy();\n    stage();",
        "no fence has made",
    ),
    "columns cleared without a fence": HopperBug(
        RING, "simt::fence_async_proxy();\n    simt::mbarrier_arrive(full);", "simt::mbarrier_arrive(full);",
        "no fence has made", kv_end=333,
    ),
    "results read back when only shared memory is free": Bug(
        RING, "simt::store_commit();\n    }\n    output_leaves = true;", """simt::store_commit();
      simt::store_wait_read();
      const auto& out = p.attention.out;
      (void)static_cast<const volatile uint16_t*>(
          out.data)[place.batch * out.batch_stride + place.row_head * out.head_stride + token * out.token_stride];
    }
    output_leaves = true;""", "data race", THREAD,
    ),
    "a named barrier that does not exist": Bug(
        RING, "(1 + group);  // the whole output", "(16 + group);  // the whole output", "named barrier: ids"
    ),
    "one named barrier for different numbers of threads": HopperBug(
        RING, "simt::sync_warpgroups<Traits::kConsumers>(1 + Traits::kConsumers);",
        "simt::sync_warpgroups<Traits::kConsumers>(1);", "different numbers of others", head_dim=192, backward=True,
    ),
    "registers that nobody has given up": Bug(
        RING, "simt::shrink_registers<Traits::kProducerRegisters>();", "", "more registers than"
    ),
    "registers given up by one warp": Bug(
        RING, "simt::shrink_registers<", "if (threadIdx.x / 32 % 4 == 0) simt::shrink_registers<", "deadlock"
    ),
    "too much shared memory": Bug(
        LAUNCH, "(HopperShared<Traits, ForwardPlanned<Traits>>::kBytes)",
        "(HopperShared<Traits, ForwardPlanned<Traits>>::kBytes + 100 * 1024)", "beyond what a device takes",
    ),
    "barriers that no fence has made visible to copies": Bug(
        RING, "simt::mbarrier_fence_init();", "", "fence.mbarrier_init"
    ),
}  # fmt: skip


def check_is_noticed(bug: Bug, folder: Path) -> None:
    """Plant a bug, and see some schedule fail as it should."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = (csrc / bug.file).read_text()
    assert source.count(bug.before) == 1, f"{bug.file} holds {source.count(bug.before)} places to plant in"
    (csrc / bug.file).write_text(source.replace(bug.before, bug.after))
    flags = ("-O1" if bug.sanitizer == THREAD else "-O0", "-g", "-w", *([bug.sanitizer] if bug.sanitizer else []))
    head_dim = bug.head_dim if isinstance(bug, HopperBug) else 64
    backward = isinstance(bug, HopperBug) and bug.backward
    kv_end = bug.kv_end if isinstance(bug, HopperBug) else None
    rows = {"kv_end": torch.tensor([kv_end], dtype=torch.int32)} if kv_end else {}
    emulated = build_hopper(folder, *flags, head_dim=head_dim, backward=backward, csrc=csrc)
    with pytest.raises(AssertionError, match=bug.noticed):
        for seed in range(8):
            if backward:
                check(emulated, *qkv(1, 4, 2, 420, 420, head_dim), Call(window=(130, 3), sinks=2), seed=seed)
                check(emulated, *qkv(1, 1, 1, 1100, 1100, head_dim), Call(window=(30, 0), sinks=2), seed=seed)
                assert not emulated.output, emulated.output
                continue
            check_forward(
                emulated, *qkv(1, 2, 2, 420, 420, head_dim), Call(window=(130, 3), sinks=2), seed=seed, **rows
            )
            check_forward(emulated, *qkv(3, 4, 4, 1, 65, head_dim), Call(window=(-1, 0)), seed=seed)
            assert not emulated.output, emulated.output
