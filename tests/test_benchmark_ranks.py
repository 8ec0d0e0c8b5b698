"""The benchmark over ranks: every way is right before it is timed, and what was kept shows what is claimed."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import distributed_benchmark as ranks
import pytest

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("context-parallel-*.json"))


def test_every_way_agrees_with_one_process(gloo):
    for errors in gloo.run(4, ranks.errors):
        assert set(errors) == {"longattn", "all-gather", "torch's ring, causal"}
        assert max(errors.values()) < 2e-6


def test_messages_alone_are_those_of_a_forward_and_backward(gloo):
    for alone, whole in gloo.run(4, ranks.halo_bytes):
        assert alone == whole > 0


def test_points_are_drawn(tmp_path):
    module = ranks.benchmark()
    points = [
        {"ranks": count, "tokens": tokens, "way": way, "part": part, "seconds": [1.0], "loopback_bytes": [tokens]}
        for count in module.RANKS
        for tokens in (16, 32)
        for way in module.WAYS
        for part in ("messages", "forward and backward")
    ]
    module.plot(points, {"cpu": "a processor", "date": "2026-11-26"}, tmp_path / "points.png")
    assert (tmp_path / "points.png").stat().st_size > 10_000


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_kept_halo_bytes_do_not_grow_with_the_length(path):
    run = json.loads(path.read_text())
    points = [p for p in run["points"] if p["way"] == "longattn" and p.get("part") == "messages"]
    shape = run["shape"]
    halo = 2 * shape["heads"] * shape["head_dim"] * 4 * (shape["window"] - 1)
    for count in {point["ranks"] for point in points}:
        sent = [median(point["loopback_bytes"]) for point in points if point["ranks"] == count]
        assert len(sent) == 5 and all(bytes_ == pytest.approx(2 * (count - 1) * halo, rel=0.05) for bytes_ in sent)


def test_a_run_is_kept():
    assert RESULTS
