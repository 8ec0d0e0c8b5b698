"""Runs of `longattn train` that end early go on to the same bits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import stored
from train_runs import Stop, losses, spec, stop_at, write_home

from longattn.train import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:'pin_memory':UserWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("train"))


@pytest.mark.parametrize("recipe", ["longlora", "full", "new-rows"])
def test_a_stopped_run_goes_on_to_the_same_bits(home, tmp_path, recipe):
    more = dict(recipe=recipe) if recipe == "longlora" else dict(recipe=recipe, rank=8)
    whole = train(spec(home, tmp_path / "whole", **more))
    part = spec(home, tmp_path / "part", **more)
    with pytest.raises(Stop):
        train(part, progress=stop_at(3))
    assert not (tmp_path / "part" / "model").exists()
    assert not json.loads((tmp_path / "part" / "log.json").read_text())["complete"]
    broken = tmp_path / "part" / "checkpoints" / "checkpoint-3"  # killed while it was written
    shutil.copytree(broken.with_name("checkpoint-2"), broken)
    (broken / "trainer_state.json").write_text("{")
    with pytest.raises(FileExistsError, match="holds a run; go on with it by resume"):
        train(part)
    resumed = train(replace(part, resume=True))
    assert losses(resumed.log) == losses(whole.log)
    found, expected = stored(resumed.checkpoint), stored(whole.checkpoint)
    assert all(torch.equal(found[name][1], value) for name, (_, value) in expected.items())
    base = stored(tmp_path / "whole" / "base")
    rows = {name for name in base if not torch.equal(base[name][1], expected[name][1])}
    if recipe == "new-rows":
        assert rows == {"model.embed_tokens.weight", "lm_head.weight"}
        assert all(torch.equal(expected[name][1][:64], base[name][1][:64]) for name in rows)
    if recipe == "full":
        assert rows == set(base)


def test_a_run_that_goes_on_logs_and_saves_as_often_as_it_is_asked_to(home, tmp_path):
    begun = spec(home, tmp_path / "out", steps=7)
    with pytest.raises(Stop):
        train(begun, progress=stop_at(3))
    resumed = train(replace(begun, resume=True, log_every=4, save_every=5))
    assert list(losses(resumed.log)) == [1, 2, 4, 5, 7]  # what is saved is logged too
    assert {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()} == {"checkpoint-5", "checkpoint-7"}


def test_a_run_does_not_go_on_with_another_text(home, tmp_path):
    shutil.copytree(home / "text", tmp_path / "text")
    begun = spec(home, tmp_path / "out", text=str(tmp_path / "text"))
    with pytest.raises(Stop):
        train(begun, progress=stop_at(3))
    (tmp_path / "text" / "00.txt").write_text("w1 w2 " * 200)
    with pytest.raises(ValueError, match="text must be what it was when the run in .* began"):
        train(replace(begun, resume=True))
    (tmp_path / "text" / "00.txt").unlink()
    assert list(losses(train(replace(begun, resume=True)).log)) == [1, 2, 3, 4]
