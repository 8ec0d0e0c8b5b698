"""Bugs planted into a copy of csrc/, to show that each check of the emulator would notice; one place each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulator.attention import Call, build_driver
from emulator.build import plant
from emulator.checks import ONE_HEAD_DIM, check, qkv

THREAD, ADDRESS = "-fsanitize=thread", "-fsanitize=address"


@dataclass(frozen=True)
class Bug:
    file: str
    before: str
    after: str
    noticed: str  # what the failure says
    sanitizer: str = ""
    shape: tuple[int, int, int] = (1, 300, 300)  # query heads of one key head, queries, keys
    call: Call = Call(window=(70, 3), sinks=2)
    cu_seqlens: tuple[int, ...] = ()


FORWARD, TILE, DECODE = "window_attn_fwd.cuh", "window_attn_tile.cuh", "window_attn_decode.cuh"
SOFTMAX, KEY_PASS, SPAN = "window_attn_softmax.cuh", "window_attn_bwd_key.cuh", "window_attn_bwd_span.cuh"
FEW = (4, 5, 700)
# One bug for each kind of check.
BUGS = {
    "window one key too wide": Bug("band.h", "return p + right;", "return p + right + 1;", "exceeds"),
    "no swizzle": Bug(TILE, "kRun == 8 ? row & 7 : (row >> 1) & 3", "row * 0", "bank_conflicts"),
    "shuffle in a branch": Bug(
        SOFTMAX, "top = fmaxf(top, simt::shfl_xor(top, 2));", "if (threadIdx.x & 1) top = simt::shfl_xor(top, 2);",
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
        FORWARD, "simt::cp_async_wait<kSlots - 2>();\n    __syncthreads();  // K", "__syncthreads();  // K", "NaN"
    ),
    "a slot of the ring too early": Bug(FORWARD, "return after(value()); }", "return value(); }", "exceeds|NaN"),
    "maximum of half of a row": Bug(SOFTMAX, "top = fmaxf(top, simt::shfl_xor(top, 2));", "", "exceeds"),
    "too little shared memory": Bug(
        FORWARD, "kQueryBytes + kSlots * kKeyBytes + kVis", "kQueryBytes - 32 + kSlots * kKeyBytes + kVis",
        "AddressSanitizer", ADDRESS,
    ),
    "no barrier after a stage": Bug(
        KEY_PASS, "__syncthreads();  // the stage and the rows' ranges are done with", "",
        "data race", THREAD,
    ),
    "a stage read before it is there": Bug(
        "window_attn_bwd_query.cuh", "simt::cp_async_wait<1>();", "simt::cp_async_wait<2>();", "NaN"
    ),
    "a chunk of sinks left out": Bug(KEY_PASS, "int next = 1;", "int next = 2;", "exceeds", shape=(1, 2200, 2200)),
    "sinks of one document alone": Bug(
        SPAN, "band.document_at(chunk * kSinkChunk + band.offset)", "band.document_at(band.offset)", "exceeds|NaN",
        shape=(1, 2200, 2200), cu_seqlens=(0, 1000, 2200),
    ),
    "sinks taken for ordered rows": Bug(
        SPAN, "ordered &= first_chunk", "ordered |= first_chunk", "exceeds", shape=(1, 1600, 1600),
        cu_seqlens=(0, 20, 1600),
    ),
    "a part left out where splits are combined": Bug(
        DECODE, "for (int split = thread / chunks;", "for (int split = 1 + thread / chunks;", "exceeds", shape=FEW
    ),
    "keys of the first head for all": Bug(
        DECODE, "if (p.band.group) {", "if (p.band.group < 0) {", "exceeds", shape=FEW,
        call=Call(group=300, shifts=(0, 200, 100, 0)),
    ),
    "a warp left out where they are merged": Bug(
        DECODE, "for (int w = 0; w < Traits::kKeyWarps", "for (int w = 1; w < Traits::kKeyWarps", "exceeds",
        shape=(4, 2, 700),
    ),
    "the ring written before it is read": Bug(
        DECODE, "__syncthreads();  // K is there, the last V is done with", "", "data race", THREAD, shape=FEW
    ),
    "slots that were never written are read": Bug(
        DECODE, "place.kv_head, keys.end, p.head_dim, p.aligned);\n    streams[1]",
        "place.kv_head, keys.end + 64, p.head_dim, p.aligned);\n    streams[1]", "AddressSanitizer", ADDRESS,
        shape=FEW,
    ),
    "delta without the log-sum-exp's gradient": Bug("window_attn_bwd_rows.cuh", "dot - grad_lse}", "dot}", "exceeds"),
    "rows past the end are written": Bug(
        TILE, "if (from + row >= rows || chunk * 8 >= channels) continue;", "if (chunk * 8 >= channels) continue;",
        "AddressSanitizer", ADDRESS,
    ),
}  # fmt: skip


def check_is_noticed(bug: Bug, folder: Path) -> None:
    """Plant a bug, and see the run fail as it should."""
    csrc = plant(folder, bug.file, bug.before, bug.after)
    flags = (*ONE_HEAD_DIM, "-w", *([bug.sanitizer] if bug.sanitizer else []))
    emulated = build_driver(folder, *flags, csrc=csrc)
    heads, queries, keys = bug.shape
    rows = {"cu_seqlens": torch.tensor(bug.cu_seqlens, dtype=torch.int32)} if bug.cu_seqlens else {}
    with pytest.raises(AssertionError, match=bug.noticed):
        for seed in range(4):
            check(emulated, *qkv(1, heads, 1, queries, keys, 32), bug.call, seed=seed, **rows)
