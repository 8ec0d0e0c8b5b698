"""Bugs planted into a copy of csrc/, to show that each check of the emulator would notice; one place each."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulator.attention import Call, build_driver
from emulator.build import ROOT
from emulator.checks import ONE_HEAD_DIM, check, qkv

THREAD, ADDRESS = "-fsanitize=thread", "-fsanitize=address"


@dataclass(frozen=True)
class Bug:
    file: str
    before: str
    after: str
    noticed: str  # what the failure says
    sanitizer: str = ""


FORWARD, TILE = "window_attn_fwd.cuh", "window_attn_tile.cuh"
# One bug for each kind of check.
BUGS = {
    "window one key too wide": Bug("band.h", "return p + right;", "return p + right + 1;", "exceeds"),
    "no swizzle": Bug(TILE, "kRun == 8 ? row & 7 : (row >> 1) & 3", "row * 0", "bank_conflicts"),
    "shuffle in a branch": Bug(
        FORWARD, "top = fmaxf(top, simt::shfl_xor(top, 2));", "if (threadIdx.x & 1) top = simt::shfl_xor(top, 2);",
        "deadlock|divergent",
    ),
    "no barrier before V is read": Bug(
        FORWARD, "__syncthreads();  // V is there, K is done with", "", "data race", THREAD
    ),
    "rows past the end are read": Bug(
        TILE, "const bool exists = from + row + r < source.rows;\n#pragma unroll\n      for", 
        "const bool exists = true;\n#pragma unroll\n      for", "AddressSanitizer", ADDRESS,
    ),
}  # fmt: skip
MORE_BUGS = {
    "interior too wide": Bug(
        "window_attn_logits.cuh", "return Range{last.band.begin, first.band.end}.covers",
        "return Range{first.band.begin, last.band.end}.covers", "exceeds",
    ),
    "K read before it is there": Bug(
        FORWARD, "simt::cp_async_wait<0>();\n    __syncthreads();  // K", "__syncthreads();  // K", "NaN"
    ),
    "maximum of half of a row": Bug(FORWARD, "top = fmaxf(top, simt::shfl_xor(top, 2));", "", "exceeds"),
    "too little shared memory": Bug(
        FORWARD, "kSharedBytes = kQueryBytes", "kSharedBytes = -32 + kQueryBytes", "AddressSanitizer", ADDRESS
    ),
    "no barrier after a stage": Bug(
        "window_attn_bwd_key.cuh", "__syncthreads();  // the stage and the rows' ranges are done with", "",
        "data race", THREAD,
    ),
    "a stage read before it is there": Bug(
        "window_attn_bwd_query.cuh", "simt::cp_async_wait<1>();", "simt::cp_async_wait<2>();", "NaN"
    ),
    "a chunk of sinks left out": Bug(
        "window_attn_bwd_key.cuh", "int chunk = 1; chunk <", "int chunk = 2; chunk <", "exceeds"
    ),
    "delta without the log-sum-exp's gradient": Bug("window_attn_bwd_rows.cuh", "dot - grad_lse}", "dot}", "exceeds"),
    "rows past the end are written": Bug(
        TILE, "if (from + row >= rows || chunk * 8 >= channels) continue;", "if (chunk * 8 >= channels) continue;",
        "AddressSanitizer", ADDRESS,
    ),
}  # fmt: skip


def check_is_noticed(bug: Bug, folder: Path) -> None:
    """Plant a bug, and see the run fail as it should."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = (csrc / bug.file).read_text()
    assert source.count(bug.before) == 1, f"{bug.file} holds {source.count(bug.before)} places to plant in"
    (csrc / bug.file).write_text(source.replace(bug.before, bug.after))
    flags = (*ONE_HEAD_DIM, "-w", *([bug.sanitizer] if bug.sanitizer else []))
    emulated = build_driver(folder, *flags, csrc=csrc)
    with pytest.raises(AssertionError, match=bug.noticed):
        for seed in range(4):
            length = 2200 if "chunk" in bug.before else 300
            check(emulated, *qkv(1, 1, 1, length, length, 32), Call(window=(70, 3), sinks=2), seed=seed)
