"""`longattn train` on checkpoints out of the common: which are refused, and what dtype comes out of which."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from checkpoints import edit_json, read_json, stored
from train_runs import write_home
from transformers import AutoModelForCausalLM, Gemma3Config, GPT2Config, GPT2LMHeadModel, MambaConfig
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


def test_families_that_no_plan_serves_train_as_they_are_without_one(home, tmp_path):
    shutil.copytree(home / "src", tmp_path / "src")
    (tmp_path / "src" / "model.safetensors").unlink()
    vocabulary = read_json(home / "src" / "config.json")["vocab_size"]
    GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "src"
    )
    keys = dict(model=str(tmp_path / "src"), text=str(home / "text"), recipe="full", length=64, steps=1)
    before, after = (
        stored(tmp_path / "src"),
        stored(train(TrainSpec.from_dict({**keys, "out": str(tmp_path / "out")})).checkpoint),
    )
    name = next(name for name in before if name.endswith("h.0.attn.c_attn.weight"))
    assert before.keys() == after.keys() and not torch.equal(before[name][1], after[name][1])
    with pytest.raises(ValueError, match="train: length must be at most the model's 64 positions, got 128"):
        train(TrainSpec.from_dict({**keys, "length": 128, "out": str(tmp_path / "longer")}))


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


@pytest.mark.parametrize("recipe", ["full", "longlora"])
def test_weights_beyond_float16_are_stored_in_float32_and_said_to_be(home, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "src", tmp_path / "src")
    AutoModelForCausalLM.from_pretrained(home / "src", dtype=torch.float16).save_pretrained(tmp_path / "src")
    keys = dict(model="src", text=str(home / "text"), length=64, steps=1, warmup=0, recipe=recipe)
    for out, rate, dtype in (("small", 1e-3, torch.float16), ("large", 1e5, torch.float32)):  # Adam's first step is it
        (tmp_path / "train.yaml").write_text(yaml.safe_dump({**keys, "out": out, "learning_rate": rate}))
        result = CliRunner().invoke(app, ["train", "train.yaml"])
        assert result.exit_code == 0, result.output
        weights = [value for _, value in stored(tmp_path / out / "model").values()]
        assert all(value.dtype == dtype and value.isfinite().all() for value in weights)
        assert read_json(tmp_path / out / "model" / "config.json")["dtype"] == str(dtype).removeprefix("torch.")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / out / "model").dtype == dtype
        said = "The checkpoint is in float32, not float16 as before: "
        for text in (result.stdout, (tmp_path / out / "model" / "README.md").read_text()):
            assert (said in text and "beyond float16's 65504." in text) == (out == "large")
