"""Peak memory of the attention ops, measured by the operating system in fresh processes."""

from __future__ import annotations

import sys

import pytest

from longattn.bench.cases import parse_case
from longattn.bench.memory import measure
from longattn.bench.peers import peers_for


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a process's peak before the measured part")
@pytest.mark.parametrize("shape", ["B1 H8 S16384 D64 W512", "B1 H8 S16384 D64 G512+shift"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_stays_within_a_few_outputs(shape, dtype):
    case = parse_case(shape, dtype)
    (peer,) = (peer for peer in peers_for(case.pattern, ["longattn"]) if peer.name == "longattn")
    growth = measure(case, peer)
    assert not growth.trouble
    assert growth.forward <= 3 * growth.output_bytes
    assert growth.backward <= 2 * growth.grad_bytes
    assert 0 < growth.output_bytes < growth.forward, "a forward that holds less than its output was not measured"
