"""The counting of machine instructions in .ci/cuda_loops.py, on made-up machine code."""

import sys
from pathlib import Path

import pytest

CI = Path(__file__).parents[1] / ".ci"


@pytest.fixture
def loops(monkeypatch):
    monkeypatch.syspath_prepend(str(CI))
    import cuda_loops

    yield cuda_loops.loops_of
    for name in ("cuda_loops", "cuda_budget"):
        sys.modules.pop(name, None)


def sass(*lines):
    """Disassembly of instructions; `<label>` in one stands for the address of the line that starts with `label: `."""
    labels, texts = {}, []
    for number, line in enumerate(lines):
        label, colon, rest = line.partition(": ")
        labels[label if colon else number] = number * 16
        texts.append(rest if colon else line)
    for label, address in labels.items():
        texts = [text.replace(f"<{label}>", hex(address)) for text in texts]
    return "\n".join(f"        /*{16 * number:04x}*/    {text} ;   /* 0x0 */" for number, text in enumerate(texts))


def test_cheapest_way_with_all_products_and_loads_is_counted(loops):
    code = sass(
        "MOV R1, R2",
        "head: @P1 BRA <masked>",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "@!P2 BRA <rest>",
        "LDGSTS.E.BYPASS.128 [R1], [R2.64]",
        "rest: IADD3 R1, R1, 0x1, RZ",
        "@P0 BRA <head>",
        "EXIT",
        "masked: HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "FSEL R4, R4, -INF, P3",
        "LDGSTS.E.BYPASS.128 [R1], [R2.64]",
        "BRA <rest>",
    )
    (loop,) = loops(code)
    assert (loop.hmma, loop.instructions, loop.count("LDGSTS"), loop.count("FSEL")) == (1, 6, 1, 0)


def test_loops_without_products_and_around_products_are_not_counted(loops):
    code = sass(
        "MOV R1, R2",
        "outer: LDG.E R1, [R2.64]",
        "wait: YIELD",
        "@P1 BRA <wait>",
        "inner: HMMA.16816.F32 R4, R8, R12, R4",
        "HMMA.16816.F32 R4, R8, R12, R4",
        "@P2 BRA <inner>",
        "@P3 CALL.REL.NOINC <over>",
        "BRA <outer>",
        "over: EXIT",
    )
    (loop,) = loops(code)
    assert (loop.hmma, loop.instructions) == (2, 3)


def test_a_predicated_call_over_the_next_instruction_is_a_jump(loops):
    code = sass(
        "head: HMMA.16816.F32 R4, R8, R12, R4",
        "NOP",
        "@!P3 CALL.REL.NOINC <over>",
        "BRA <head>",
        "over: EXIT",
    )
    (loop,) = loops(code)
    assert (loop.hmma, loop.instructions) == (1, 4)
