"""The long part of the emulated rotary tests: planted bugs and sanitizers.

pytest tests/emulator/full_rope.py
"""

import subprocess

import pytest
import test_emulated_rope as rope
import torch
from emulator.build import ROOT, compile_cpp, load, plant

PROBE, DRIVER = (ROOT / "tests" / "emulator" / name for name in ("rope_probe.cpp", "rope_driver.cpp"))
BUGS = {
    "tables read before they are formed": (
        "rope.cu", "form_tables(tables, p, plan);\n    __syncthreads();", "form_tables(tables, p, plan);"
    ),
    "a quarter of a turn mirrored": ("rope_phase.h", "quarter == 1 || quarter == 2", "quarter == 2"),
    "positions of the first row for all": ("rope.cu", "batch * phases.position_stride[0] +", "0 * batch +"),
    "documents that count from the row": (
        "rope.cu", "return token - phases.cu_seqlens[", "return token - 0 * phases.cu_seqlens["
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_planted_rope_bug_is_noticed(name, tmp_path):
    library = load(tmp_path, PROBE, "-O1", "-w", "-DLONGATTN_EMULATED", csrc=plant(tmp_path, *BUGS[name]))
    with pytest.raises(AssertionError):
        rope.test_phases_formed_in_the_kernel_are_right(library, 64, 32, torch.bfloat16, False)


def test_a_phase_in_float32_is_noticed(tmp_path):
    exact = "static_cast<uint64_t>(position) * turns_of(inv_freq)"
    rounded = "static_cast<uint64_t>(static_cast<float>(position) * static_cast<float>(inv_freq) * 0x1p61f)"
    library = load(
        tmp_path, PROBE, "-O1", "-w", "-DLONGATTN_EMULATED", csrc=plant(tmp_path, "rope_phase.h", exact, rounded)
    )
    with pytest.raises(AssertionError):
        rope.test_phases_are_right_to_float32_at_ten_million(library)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_no_race_and_nothing_outside(sanitizer, tmp_path):
    flags = ("-O1", "-g", "-DLONGATTN_EMULATED", f"-fsanitize={sanitizer}")
    program = compile_cpp(tmp_path, DRIVER, *flags, output="driver")
    for seed in ("0", "1", "2"):
        done = subprocess.run([program, seed], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
