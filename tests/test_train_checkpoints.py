"""`longattn train` on checkpoints out of the common: which are refused, and what dtype comes out of which."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from checkpoints import edit_json, read_json, stored
from train_runs import write_home
from transformers import AutoModelForCausalLM, Gemma3Config, MambaConfig
from typer.testing import CliRunner

from longattn.cli import app
from longattn.train import TrainSpec, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:'pin_memory':UserWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("train"))


def test_weights_keep_their_dtype_where_the_config_names_none(home, tmp_path):
    shutil.copytree(home / "src", tmp_path / "src")
    model = AutoModelForCausalLM.from_pretrained(home / "src", dtype=torch.float16)
    model.save_pretrained(tmp_path / "src")
    config = read_json(tmp_path / "src" / "config.json")
    del config["dtype"]
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    keys = dict(model=str(tmp_path / "src"), text=str(home / "text"), out=str(tmp_path / "out"), length=64, steps=1)
    trained = stored(train(TrainSpec.from_dict(keys)).checkpoint)
    assert all(value.dtype == torch.float16 for _, value in trained.values())


def test_checkpoints_that_cannot_be_trained_are_refused_without_a_plan_too(home, tmp_path):
    quantised, empty = tmp_path / "quantised", tmp_path / "empty"
    shutil.copytree(home / "src", quantised)
    edit_json(quantised / "config.json", quantization_config={"quant_method": "awq"})
    shutil.copytree(home / "src", empty)
    (empty / "model.safetensors").rename(empty / "pytorch_model.bin")
    keys = dict(text=str(home / "text"), out=str(tmp_path / "out"), length=64, steps=1)
    for model, message in {quantised: r"is quantised \(awq\)", empty: "safetensors"}.items():
        with pytest.raises(ValueError, match=message):
            train(TrainSpec.from_dict({**keys, "model": str(model)}))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [MambaConfig(), Gemma3Config()], ids=["mamba", "gemma3"])
@pytest.mark.parametrize("plan", [{}, {"attention": "window:16"}], ids=["no plan", "plan"])
def test_families_that_are_not_served_are_refused_in_one_line(home, tmp_path, monkeypatch, config, plan):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "src", tmp_path / "src")
    config.save_pretrained(tmp_path / "src")
    keys = dict(model="src", text=str(home / "text"), out="out", length=64, steps=1, **plan)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(keys))
    result = CliRunner().invoke(app, ["train", "train.yaml"])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith(f"longattn train: model_type '{config.model_type}' is not served: ")
