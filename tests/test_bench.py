"""The benchmark itself: wrong peers are caught, what a run writes, fitted exponents."""

import json
from dataclasses import replace

import pytest
import torch
from reference import dense, half_shifts, visible_mask
from typer.testing import CliRunner

from longattn.bench.cases import GOALS, parse_case
from longattn.bench.compare import BOTH, FORWARD, Entry, Method, compare
from longattn.bench.kernels import Sizes, measure_kernels
from longattn.bench.memory import measure
from longattn.bench.peers import OURS, PEERS, Peer, peers_for
from longattn.bench.reference import dense_results, picked
from longattn.bench.report import goals_met
from longattn.bench.rope import RopeShape, compare_rope
from longattn.bench.scaling import Grid, fit_exponent, fits, measure_scaling
from longattn.bench.timing import Sample, interleave, median_ms
from longattn.cli import app
from longattn.ops import dispatch
from longattn.pattern import Pattern

SHAPE = "B2 H4 K2 S150 D16 W20"
METHOD = Method(rounds=2, budget_s=1.0)
UNCOMPILED = [peer for peer in PEERS if not peer.compiled]


def entries_of(shape, *peers, dtype="float32"):
    found = compare(parse_case(shape, dtype), [PEERS[0], *peers], METHOD)
    return {(entry.peer, entry.work): entry for entry in found}


@pytest.mark.parametrize(
    "pattern", [Pattern("full"), Pattern("window", 7, sinks=3), Pattern("group", 16), Pattern("group", 16, shift=5)]
)
def test_reference_agrees_with_the_tests_reference(pattern):
    case = replace(parse_case("B1 H4 K2 S300 D8 full"), pattern=pattern)
    inputs = case.inputs()
    window = {"full": (-1, 0), "window": (pattern.size - 1, 0), "group": None}[pattern.kind]
    group = pattern.size if pattern.kind == "group" else None
    mask = visible_mask(
        1, 4, 300, 300, window=window, group=group, shifts=half_shifts(4, pattern.shift), sinks=pattern.sinks
    )
    leaves = [x.double().requires_grad_() for x in inputs[:3]]
    out, _ = dense(*leaves, mask)
    expected = (out, *torch.autograd.grad(out, leaves, inputs[3].double()))
    for got, ref in zip(dense_results(case, inputs), expected, strict=True):
        torch.testing.assert_close(got, picked(ref.detach(), case))


def test_reference_of_some_heads_and_last_queries_is_a_part_of_the_whole():
    case, rows = parse_case("B2 H8 K4 S70 D8 G16+shift"), [(0, 0), (1, 3)]
    inputs = case.inputs(token_major=True)
    whole = dense_results(case, inputs)
    part = dense_results(case, inputs, rows=rows)
    for got, all_of_it in zip(part, whole, strict=True):
        torch.testing.assert_close(got, all_of_it[[0, 7]])
    last = replace(case, queries=5)
    query, *rest = inputs
    out = dense_results(last, (query[:, :, -5:], *rest[:2], rest[2][:, :, -5:]))[0]
    torch.testing.assert_close(out, whole[0][:, :, -5:])
    assert last.flops == case.flops - replace(case, tokens=65).flops and last.shape == "B2 H8 K4 Q5 S70 D8 G16+shift"


@pytest.mark.parametrize("shape", [SHAPE, "B1 H4 S130 D16 G32+shift", "B1 H2 S96 D16 full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_uncompiled_peers_are_right_and_timed_where_they_can_run(shape, dtype):
    case = parse_case(shape, dtype)
    for entry in compare(case, peers_for(case.pattern, [p.name for p in UNCOMPILED]), METHOD):
        if entry.trouble:
            assert entry.trouble.startswith("not here") or "as many key/value heads" in entry.trouble, entry
            assert not entry.samples and entry.ratio is None
        else:
            assert len(entry.samples) == 2 and entry.median_ms > 0 and entry.ratio > 0 and entry.gflops > 0
            names = {"out"} if entry.work == FORWARD else {"out", "grad_query", "grad_key", "grad_value"}
            assert set(entry.errors) == names


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("a key too many", Pattern("window", 21)), ("a key too few", Pattern("window", 19)), ("full", Pattern("full"))],
)
def test_wrong_peer_is_reported_and_not_timed(name, pattern):
    wrong = Peer(name, lambda case: pattern.attend)
    found = entries_of(SHAPE, wrong)
    for work in (FORWARD, BOTH):
        assert found[name, work].trouble.startswith("wrong: out's error is")
        assert not found[name, work].samples and found[name, work].ratio is None
        assert found[OURS, work].ratio == 1.0


def test_wrong_gradient_is_reported_and_not_timed():
    def prepare(case):
        right = PEERS[0].prepare(case)
        return lambda query, key, value: right(query, key, value + 1e-3 * (value - value.detach()))

    found = entries_of(SHAPE, Peer("crooked", prepare))
    assert found["crooked", FORWARD].trouble == "" and found["crooked", FORWARD].samples
    assert found["crooked", BOTH].trouble.startswith("wrong: grad_value's error is")


def test_low_precision_and_nan_and_shape_are_caught():
    half = Peer("half", lambda case: lambda *x: PEERS[0].prepare(case)(*(t.bfloat16() for t in x)).float())
    nan = Peer("nan", lambda case: lambda *x: PEERS[0].prepare(case)(*x) * float("nan"))
    short = Peer("short", lambda case: lambda *x: PEERS[0].prepare(case)(*x)[..., :-1])
    found = entries_of(SHAPE, half, nan, short)
    assert all(found[name, FORWARD].trouble.startswith("wrong: out") for name in ("half", "nan", "short"))


def test_missing_or_failing_peer_becomes_a_text():
    def absent(case):
        import a_module_that_nobody_has  # noqa: F401

    def forward_only(case):
        def call(query, key, value):
            if query.requires_grad:
                raise NotImplementedError("no backward here")
            return PEERS[0].prepare(case)(query, key, value)

        return call

    found = entries_of(SHAPE, Peer("absent", absent), Peer("forward only", forward_only))
    assert found["absent", FORWARD].trouble.startswith("not here: ModuleNotFoundError: No module named")
    assert found["forward only", BOTH].trouble == "NotImplementedError: no backward here"
    assert found["forward only", FORWARD].ratio > 0


def test_peer_that_sees_another_pattern_is_held_to_that_one():
    wider = Peer("wider", lambda case: Pattern("window", 21).attend, lambda pattern: replace(pattern, size=21))
    assert entries_of(SHAPE, wider)["wider", FORWARD].trouble == ""


def test_calls_take_turns_and_slow_ones_sit_out():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = interleave(calls, rounds=3, budget_s=100.0)
    assert "".join(order) == "abcbcacab" and [len(taken) for taken in samples.values()] == [3, 3, 3]
    assert len(interleave(calls, rounds=9, budget_s=0.0, least=2)["a"]) == 2


def test_median_is_by_the_clock_asked_for():
    samples = [Sample(wall_s=0.5, cpu_s=0.2), Sample(wall_s=0.1, cpu_s=0.1), Sample(wall_s=0.3, cpu_s=0.4)]
    assert (median_ms(samples, "wall"), median_ms(samples, "cpu")) == pytest.approx((300.0, 200.0))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_fitted_exponent_of_power_laws_is_exact(power):
    sizes = [100, 300, 700, 5000]
    assert fit_exponent(sizes, [7.5 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


def test_fit_refuses_what_has_no_slope():
    with pytest.raises(ValueError, match="fit_exponent: at least 2 different sizes"):
        fit_exponent([5, 5], [1, 2])
    with pytest.raises(ValueError, match="fit_exponent: sizes and values must be above 0"):
        fit_exponent([1, 2], [0, 2])


def test_scaling_measures_every_series_and_leaves_out_the_slow():
    grid = Grid((64, 128, 1 << 15), (8, 16), 16, 64, heads=1, head_dim=8, most_s=1e-9)
    points = measure_scaling(replace(grid, lengths=(64, 128)), "float32", rounds=1, memory=False)
    full = [point for point in points if point.way == "longattn, full"]
    assert full[0].median_ms > 0 and full[1].median_ms is None and "left out" in full[1].trouble
    exponents = {(fit.way, fit.quantity, fit.over): fit for fit in fits(points)}
    assert set(exponents) == {("longattn, window", "time", "S"), ("longattn, window", "time", "W")}
    assert exponents["longattn, window", "time", "S"].claimed == 1.0
    for point, (size, milliseconds) in zip(points[:2], [(64, 1.0), (128, 2.0)], strict=True):
        assert point.size == size
        point.median_ms = milliseconds
    assert fits(points)[0].exponent == pytest.approx(1.0)


def test_memory_of_a_dense_mask_grows_with_the_square_and_ours_does_not():
    ours, dense_peer = (next(p for p in PEERS if p.name == name) for name in (OURS, "sdpa, dense mask"))
    case = parse_case("B1 H1 S4096 D16 W64")
    hog = torch.ones(200 << 18)  # 200 MiB here must not hide growth there
    growths = [measure(case, peer) for peer in (ours, dense_peer)]
    del hog
    assert growths[1].forward > 4096**2 and 0 < growths[0].forward < 4096**2 / 2
    assert growths[0].both >= growths[0].backward > 0 and not growths[0].trouble


def test_rope_ways_are_right_and_timed():
    for dtype in (torch.float32, torch.bfloat16):
        found = {e.name: e for e in compare_rope(RopeShape(2, 1, 64, 32), dtype, METHOD, compiled=False)}
        assert found["longattn"].ratio == 1.0 and len(found["longattn, pure"].samples) == 2
        assert all(not entry.trouble or "Error" in entry.trouble for entry in found.values())


needs_kernels = pytest.mark.skipif(
    getattr(dispatch.compiled_module(), "cpu_isa", lambda: "none")() == "none", reason="no compiled attention here"
)


@needs_kernels
def test_kernels_are_held_to_ceilings_timed_beside_them():
    sizes = Sizes(128, (32, 16), (16,), 256, 32, 1 << 16, 32)
    cells, ceilings = measure_kernels(sizes, threads=[1, 2], rounds=2, clock="wall")
    assert len({(cell.name, cell.threads) for cell in cells}) == len(cells)
    works = ["forward", "backward", "decode", "rotate", "rotate back", "rotate in place", "rotate back in place"]
    assert list(dict.fromkeys(cell.work for cell in cells)) == [*works, "rotate interleaved"]
    for cell in cells:
        assert len(cell.samples) == 2 and cell.rate > 0
        beside = {rate for name, rate in ceilings.items() if name.startswith(cell.ceiling)}
        assert cell.ceiling_rate in beside
        assert cell.share == cell.rate / cell.ceiling_rate


@needs_kernels
def test_register_peak_counts_operations():
    peak = dispatch.compiled_module().cpu_peak
    assert peak("float32", 10, 1) > 0 and peak("float32", 20, 3) == 6 * peak("float32", 10, 1)


def test_goals_compare_ratios_with_what_is_aimed_at():
    goal = GOALS[0]
    entries = [Entry(goal.shape, goal.dtype, goal.work, goal.peer, "", ratio=ratio) for ratio in (0.5, 3.0)]
    assert [goals_met([entry])[0]["met"] for entry in entries] == [False, True]
    assert goals_met([]) == []


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("B1 H8 S64 D16", "a pattern missing"),
        ("B1 H8 D16 W4", "S missing"),
        ("B1 B1 H8 S64 D16 W4", "gives B twice"),
        ("B1 H3 K2 S64 D16 W4", "H must be a multiple of K"),
        ("B1 H2 Q65 S64 D16 W4", "Q must lie between 1 and S"),
    ],
)
def test_shape_that_is_not_understood_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        parse_case(shape)


def test_shape_text_reads_back():
    for shape in (SHAPE, "B1 H8 S4096 D64 G512+shift", "B1 H8 S64 D64 W5+sinks:4", "B1 H8 K1 Q3 S64 D64 full"):
        assert parse_case(parse_case(shape).shape) == parse_case(shape)


def test_command_writes_tables_json_and_picture(tmp_path):
    arguments = [
        "bench",
        "--quick",
        "--shape",
        "B1 H2 S128 D16 W16",
        "--peer",
        "sdpa, dense mask",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, [*arguments, "--no-memory", "--rounds", "2"])
    assert result.exit_code == 0, result.output
    assert "sdpa, dense mask" in result.output and "rotary embedding" in result.output
    (written,) = tmp_path.glob("cpu-*.json")
    run = json.loads(written.read_text())
    assert {"cpu", "cores", "threads", "torch", "commit", "date"} <= set(run["machine"])
    assert set(run["ceilings"]) == {"copy GB/s", "matmul float32 GFLOP/s"}
    assert [(e["peer"], e["work"], len(e["samples"])) for e in run["attention"]] == [
        (peer, work, 2) for peer in (OURS, "sdpa, dense mask") for work in (FORWARD, BOTH)
    ]
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@needs_kernels
def test_command_measures_the_compiled_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr("longattn.cli.bench.QUICK_SIZES", Sizes(128, (32,), (16,), 256, 32, 1 << 16, 32))
    arguments = ["bench", "--cpu", "--quick", "--shape", "B1 H2 S128 D16 W16", "--peer", "sdpa, dense mask"]
    result = CliRunner().invoke(app, [*arguments, "--no-memory", "--no-rope", "--rounds", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "compiled kernels, 1 thread" in result.output and "registers float32" in result.output
    (written,) = tmp_path.glob("kernels-*.json")
    run = json.loads(written.read_text())
    assert all(cell["median_ms"] > 0 and cell["share"] > 0 for cell in run["kernels"]) and run["attention"]
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_command_refuses_an_unknown_peer(tmp_path):
    result = CliRunner().invoke(app, ["bench", "--peer", "nobody", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "nobody" in result.output and not (tmp_path / "out").exists()
