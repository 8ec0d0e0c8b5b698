"""The benchmark for GPUs, tried out on the CPU: cells, peers' calls, what a run leaves and how it goes on."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cuda_small_set
import pytest
import torch

from longattn.bench.cases import parse_case
from longattn.bench.compare import BACKWARD, FORWARD, Method, compare
from longattn.bench.gpu import __main__ as bench
from longattn.bench.gpu.cells import FULL_SIZE, TINY, cells, same_area
from longattn.bench.gpu.cudnn import Graphs, stats_like
from longattn.bench.gpu.measure import ROTATED, Bench
from longattn.bench.gpu.peers import FLASH, WINDOW, gpu_peers
from longattn.bench.gpu.record import Record
from longattn.bench.gpu.tables import tables
from longattn.bench.peers import OURS, PEERS, Peer
from longattn.pattern import Pattern

ROOT = Path(__file__).parents[1]
SILENT = Bench("cpu", "core", lambda text: None, compiled=False)
FACTS = {"device": "Some GPU", "driver": "1", "torch": "2", "commit": "abc", "sources": "123", "hopper": ""}
FACTS["date"] = "2026-01-02T03"


def test_core_holds_the_twelve_cells_first_then_groups_rope_and_decoding():
    found = cells("core", FULL_SIZE, "cuda")
    windows = [cell.measured for cell in found[:12]]
    assert {(c.tokens, c.pattern.size, c.heads, c.kv_heads, c.head_dim) for c in windows} == {
        (tokens, window, 32, kv, dim)
        for tokens in (8192, 32768)
        for window in (128, 1024, 4096)
        for kv, dim in ((32, 64), (4, 128))
    }
    assert all(c.batch * c.tokens == 32768 for c in windows)
    assert {cell.what for cell in found[12:]} == {"group", "rope", "decode"}
    assert all(cell.measured.queries == 1 for cell in found if cell.what == "decode")
    assert len({cell.name for cell in found}) == len(found)


def test_grid_holds_every_length_with_every_narrower_window():
    found = [cell.measured for cell in cells("grid", FULL_SIZE, "cuda")]
    sizes = {(c.head_dim, c.pattern.size, c.tokens) for c in found}
    assert len(sizes) == len(found) and {c.tokens for c in found} == {1024 << n for n in range(1, 8)}
    assert (64, 128, 131072) in sizes and (128, 4096, 8192) in sizes and (64, 4096, 4096) not in sizes
    assert {c.batch for c in found if c.tokens >= 32768} == {1}


@pytest.mark.parametrize("pattern", [Pattern("group", 2048, 1024), Pattern("group", 32), Pattern("full")])
def test_window_of_the_same_area_is_the_nearest(pattern):
    size = same_area(pattern, 8192).size
    areas = [abs(Pattern("window", each).visible(8192) - pattern.visible(8192)) for each in range(1, 8193)]
    assert areas[size - 1] == min(areas)


def test_inputs_go_round_in_more_memory_than_a_cache_holds():
    gpu = replace(SILENT, device="cuda")
    for size in (1000, 10**6, 10**8, 3 * 10**8):
        method = gpu._method(size, (FORWARD,))
        assert (method.sets - 1) * size <= ROTATED < method.sets * size and method.rounds == 7


def test_a_backward_alone_is_checked_and_goes_round_its_inputs():
    seen = []

    def prepare(case):
        def call(query, key, value):
            seen.append(query.data_ptr())
            return case.pattern.attend(query, key, value)

        return call

    case = parse_case("B2 H4 K2 S100 D16 W20", "bfloat16")
    method = Method(rounds=4, budget_s=9.0, works=(FORWARD, BACKWARD), sets=3, token_major=True, rows=[(1, 0)])
    found = compare(case, [PEERS[0], Peer("watched", prepare)], method)
    assert [(e.peer, e.work) for e in found] == [(p, w) for p in (OURS, "watched") for w in (FORWARD, BACKWARD)]
    assert all(not e.trouble and len(e.samples) == 4 and e.ratio > 0 for e in found)
    assert found[1].errors.keys() == {"out", "grad_query", "grad_key", "grad_value"}
    assert len(set(seen)) == 3, "as many inputs as sets, and the backward calls no forward"
    assert len(seen) == 3 + 1 + 4, "outputs made for the backward, the check of the forward, its samples"


def test_results_are_checked_at_the_rows_that_are_named_alone():
    def prepare(case):
        def call(query, key, value):
            out = case.pattern.attend(query, key, value).clone()
            out[0, 0] += 1
            return out

        return call

    case = parse_case("B2 H4 K2 S100 D16 W20")
    method = Method(rounds=1, budget_s=9.0, works=(FORWARD,), rows=[(1, 1)])
    assert not compare(case, [Peer("wrong elsewhere", prepare)], method)[0].trouble
    found = compare(case, [Peer("wrong", prepare)], replace(method, rows=[(0, 0)]))
    assert found[0].trouble.startswith("wrong: out")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A window, a group, a rope and a decoding cell of the tiny sizes, measured on the CPU; its folder and content."""
    folder = tmp_path_factory.mktemp("run")
    found = cells("core", TINY, "cpu")
    record = Record(folder, FACTS)
    record.add_ceilings(SILENT.ceilings())
    for what in ("window", "group", "rope", "decode"):
        cell = next(cell for cell in reversed(found) if cell.what == what)
        record.add(cell.name, SILENT.cell(cell))
    return folder, json.loads(record.path.read_text())


def test_cells_of_every_kind_are_measured(tiny_run):
    for name, cell in tiny_run[1]["cells"].items():
        by_peer = {(e.get("peer") or e["name"], e["work"]): e for e in cell["entries"]}
        works = (FORWARD,) if cell["what"] == "decode" else (FORWARD, BACKWARD)
        for work in works:
            ours = by_peer[OURS, work]
            assert ours["ratio"] == 1.0 and len(ours["samples"]) == 7 and not ours["trouble"], name
        assert cell["machine"] == FACTS and cell["bytes"] > 0
        if cell["what"] in ("window", "decode"):
            assert "_flash_attention_forward" in by_peer[FLASH, FORWARD]["trouble"], "no such kernel on a CPU"
        if cell["what"] == "group":
            assert by_peer[WINDOW, BACKWARD]["ratio"] > 0


def test_tables_show_every_cell_and_aim(tiny_run):
    text = "\n".join(tables(tiny_run[1]))
    for name in tiny_run[1]["cells"]:
        assert f"| {name.partition(' ')[2]} | {FORWARD} | " in text
    for part in ("| window | work |", "geometric mean", "not timed: cuDNN", "| aim |", "shifted groups", "8 us over"):
        assert part in text
    assert "\n".join(tables({"machine": FACTS, "ceilings": [], "cells": {}})).startswith("Some GPU, driver 1")


def test_a_run_goes_on_where_the_last_one_of_the_same_sources_ended(tiny_run):
    folder, content = tiny_run
    again = Record(folder, {**FACTS, "date": "2026-01-09T00"})
    assert again.cells == content["cells"] and again.path.name == "some-gpu-2026-01-02.json"
    other = Record(folder, {**FACTS, "sources": "456"})
    assert not other.cells and other.path.name == "some-gpu-2026-01-02-456.json"
    hopper = Record(folder, {**FACTS, "hopper": "hopper-one"})
    assert not hopper.cells and hopper.path.name == "some-gpu-hopper-one-2026-01-02.json"


def test_the_command_ends_in_time_and_says_what_remains(tmp_path, capsys):
    everything = len(cells("core", TINY, "cpu"))
    assert bench.main(["core", "--device", "cpu", "--out", str(tmp_path), "--seconds", "0"]) == everything
    printed = capsys.readouterr().out
    assert f"0 cells, {everything} remain" in printed
    assert bench.main(["grid", "--device", "cpu", "--out", str(tmp_path), "--from", "5", "--seconds", "0"]) == 1
    assert bench.main(["table", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("*.json")
    assert set(json.loads(written.read_text())["ceilings"][0]) > {"copy GB/s", "read GB/s"}


def test_cudnn_graphs_can_be_described_without_a_gpu():
    pytest.importorskip("cudnn")
    case = parse_case("B2 H4 K2 S256 D64 W32", "bfloat16")
    query, key, value, grad = case.inputs(token_major=True)
    out, stats = torch.empty_like(query), stats_like(query)
    graphs = Graphs(case)
    graph, nodes = graphs.forward(None, query, key, value, out, stats)
    assert len(nodes) == 5 and nodes[3].get_dim() == list(out.shape) and nodes[3].get_stride() == list(out.stride())
    tensors = query, key, value, out, grad, stats
    graph, nodes = graphs.backward(None, tensors, [torch.empty_like(x) for x in (query, key, value)])
    assert len(nodes) == 9 and nodes[7].get_stride() == list(key.stride())


def test_every_peer_of_a_window_is_asked_and_absent_ones_say_so():
    names = [peer.name for peer in gpu_peers("window", parse_case("B1 H4 S64 D16 W8"))]
    assert names[:2] == [OURS, FLASH] and len(names) == 7
    assert [peer.name for peer in gpu_peers("group", parse_case("B1 H4 S64 D16 G8"))][1] == WINDOW


def gpu_sh(*arguments, **environment):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_script_keeps_its_log_and_refuses_what_it_does_not_know(tmp_path):
    folder = tmp_path / "out"
    run = gpu_sh("core", "--device", "cpu", "--out", str(folder), "--seconds", "0")
    assert run.returncode == len(cells("core", TINY, "cpu")), run.stdout + run.stderr
    assert "remain: run this again" in (folder / "logs" / "core.log").read_text()
    assert gpu_sh("table", "--device", "cpu", "--out", str(folder)).returncode == 0
    assert "unknown stage nothing" in gpu_sh("nothing", "--out", str(folder)).stdout
    assert gpu_sh().returncode == gpu_sh("core", "--colour", "red").returncode == 2


def tool(folder, text, status):
    """A program that prints, in place of compute-sanitizer."""
    program = folder / "sanitizer"
    program.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("text", "status", "expected", "ends"),
    [
        ("ERROR SUMMARY: 0 errors", 0, "memcheck: ERROR SUMMARY: 0 errors", 0),
        ("Error: Device not supported", 1, "memcheck: not run, the tool refuses this device", 0),
        ("Invalid __global__ write of size 4", 9, "memcheck: FAILED", 1),
    ],
)
def test_sanitizer_that_refuses_a_device_is_told_from_one_that_finds_something(text, status, expected, ends, tmp_path):
    run = gpu_sh("sanitize", "--out", str(tmp_path / "out"), SANITIZER=tool(tmp_path, text, status))
    assert run.returncode == ends and expected in run.stdout
    assert "not run: no" in gpu_sh("sanitize", "--out", str(tmp_path / "out"), SANITIZER="no-such-tool").stdout


def test_the_small_set_for_sanitizers_calls_every_kernel(capsys):
    cuda_small_set.main("cpu")
    assert capsys.readouterr().out == "42 calls on cpu\n"
