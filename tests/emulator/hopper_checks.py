"""Holds the emulated kernels for compute capability 9.0 to the float64 reference."""

from __future__ import annotations

from pathlib import Path

import torch
from emulator.attention import Call, Emulated, build_driver
from emulator.build import ROOT
from emulator.checks import mask_of
from reference import FLOOR, assert_close, dense
from torch import Tensor

# Flags of a build each. Without optimisation the address sanitizer's takes a fifth of the time, but the thread
# sanitizer takes the emulator's own lists for the kernel's.
SANITIZED = (("-O1", "-fsanitize=thread"), ("-O0", "-fsanitize=address,undefined"))


def build_hopper(
    folder: Path, *flags: str, head_dim: int | None = None, backward: bool = False, csrc: Path = ROOT / "csrc"
) -> Emulated:
    """The driver with the kernels for compute capability 9.0, of one head dim or of all, of the forward or of both."""
    only = () if head_dim is None else (f"-DLONGATTN_ONLY_HEAD_DIM={head_dim}",)
    emulated = build_driver(folder, f"-DLONGATTN_DRIVE_SM90={1 + backward}", *only, *flags, csrc=csrc)
    emulated.multiprocessors = 2  # so that blocks take several tiles
    return emulated


def check_forward(
    emulated: Emulated,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    sink_logits: Tensor | None = None,
    *,
    seed: int = 0,
    **rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Out and lse against the float64 reference, by the project's tolerance; returns them."""
    out, lse = emulated.forward(query, key, value, call, sink_logits=sink_logits, seed=seed, **rows)
    options = dict(scale=call.scale, softcap=call.softcap, sink_logits=sink_logits)
    mask = mask_of(query, key, call, **rows)
    ref_out, ref_lse = dense(query, key, value, mask, **options)
    same_out, same_lse = dense(query, key, value, mask, **options, dtype=query.dtype)
    assert_close("out", out, ref_out, float((same_out.double() - ref_out).norm()))
    finite = torch.isfinite(ref_lse)
    dense_error = float((same_lse.double() - ref_lse)[finite].norm())
    assert_close("lse", lse, ref_lse, dense_error, floor=FLOOR[query.dtype])
    return out, lse
