"""`longattn eval` into the JSON of an earlier run: it goes on, keeps what is there, and refuses other evaluations."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("transformers")

import torch
from eval_runs import SMALL, run, run_everything, write_folder
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longattn.evaluate.page import page_of
from longattn.evaluate.results import ModelScores, read_evaluation
from longattn.evaluate.run import _describe, evaluate
from longattn.text import load_documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def done(folder):
    return run_everything(folder)


def test_stopped_run_goes_on_where_it_was(folder, done, monkeypatch):
    """What is in the file is not measured again, and nothing else is lost."""
    monkeypatch.chdir(folder)
    whole = json.loads((folder / "scores.json").read_text())
    part = json.loads((folder / "scores.json").read_text())
    part["complete"] = False
    part["models"][1]["last"][0]["nats"] = 12.0  # would be measured otherwise
    part["models"][1]["last"] = part["models"][1]["last"][:1]
    part["models"][1]["sliding"], part["models"][1]["cells"] = [], []
    (folder / "part.json").write_text(json.dumps(part))
    arguments = ["longer", "--before", "original", "--text", "books", "--lengths", "256,512", "--retrieval", "passkey"]
    result = run(*arguments, *SMALL, "--depths", "0.5,1", "--json", "part.json")
    assert result.exit_code == 0, result.output
    again = json.loads((folder / "part.json").read_text())
    assert again["complete"] and again["models"][0] == whole["models"][0]
    assert again["models"][1]["last"][0]["nats"] == 12.0
    assert again["models"][1]["last"][1:] == whole["models"][1]["last"][1:]
    for name in ("sliding", "cells"):
        assert again["models"][1][name] == whole["models"][1][name]


def test_run_that_goes_on_and_is_stopped_again_keeps_what_it_had(folder, done):
    before, saved = json.loads((folder / "scores.json").read_text()), folder / "twice.json"
    shutil.copy(folder / "scores.json", saved)
    found = read_evaluation(saved)
    seen = []

    class Stop(BaseException):
        pass

    def stop(doing, tokens):
        seen.append(doing)
        if len(seen) == 2:  # the first was saved
            raise Stop

    names = [(model.role, model.name) for model in found.models]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.chdir(folder)
        documents = list(load_documents("books"))
        evaluate(names, documents, found.settings, text_name="books", saved=saved, progress=stop)
    after = json.loads(saved.read_text())
    assert not after["complete"]
    for was, now in zip(before["models"], after["models"], strict=True):
        assert was == {**now, "cells": sorted(now["cells"], key=was["cells"].index)}


def test_a_run_that_asks_for_less_keeps_the_rest(folder, done, monkeypatch):
    """The file keeps every number; what is shown is what was asked for."""
    monkeypatch.chdir(folder)
    whole = json.loads((folder / "scores.json").read_text())
    shutil.copy("scores.json", "less.json")
    arguments = ["longer", "--before", "original", "--text", "books", "--json", "less.json"]
    asked = ["--lengths", "512", "--retrieval", "passkey", "--depths", "1"]
    result = run(*arguments, *SMALL, *asked, "--report", "less.html")
    assert result.exit_code == 0, result.output
    less = json.loads((folder / "less.json").read_text())
    assert less["complete"] and less["settings"]["lengths"] == [512]
    for was, now in zip(whole["models"], less["models"], strict=True):
        assert was == {**now, "cells": sorted(now["cells"], key=was["cells"].index)}
    assert "512" in result.stdout and "256" not in result.stdout
    assert (folder / "less.html").read_text(encoding="utf-8") == page_of(read_evaluation(folder / "less.json"))
    for count, message in ((0, None), (3, "whose sliding_windows differs: expected 2, got 3")):
        result = run(*arguments, *SMALL, "--lengths", "512", "--sliding-windows", count)
        assert (result.exit_code == 0) == (message is None) and (message or "") in result.stderr, result.output
        assert json.loads((folder / "less.json").read_text())["models"][0]["sliding"] == whole["models"][0]["sliding"]


def test_other_evaluations_are_not_gone_on_with(folder, done, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = ["longer", "--before", "original", "--text", "books", "--lengths", "256,512", "--json", "scores.json"]
    for more, message in (
        (["--last", "16"], "whose last differs: expected 32, got 16"),
        (["--seed", "3"], "whose seed differs: expected 0, got 3"),
        (["--windows", "2"], "whose windows differs: expected 3, got 2"),
        (["--lengths", "256,500"], "whose lengths differs: expected [256, 512], got [256, 500]"),
        (["--text", "books/0.txt"], "whose text differs: expected books, got books/0.txt"),
        (["--join"], "whose scored text's digest differs: expected "),
        (["--sliding-windows", "3"], "whose sliding_windows differs: expected 2, got 3"),
    ):
        result = run(*arguments, *SMALL, *more)
        assert result.exit_code == 2 and message in result.stderr, result.output
    shutil.copytree("longer", "trained")
    model = AutoModelForCausalLM.from_pretrained("trained")
    model.lm_head.weight.data[5] += 1.0
    model.save_pretrained("trained")
    shutil.move("longer", "kept")
    shutil.move("trained", "longer")
    try:
        result = run(*arguments, *SMALL)
    finally:
        shutil.move("longer", "trained")
        shutil.move("kept", "longer")
    assert result.exit_code == 2 and "was measured on other weights of longer" in result.stderr, result.output
    (folder / "other.json").write_text("{}")
    result = run(*arguments[:-1], "other.json", *SMALL)
    assert result.exit_code == 2 and "must be new, or written by longattn eval" in result.stderr


def test_a_run_with_other_models_says_so(folder, done, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = ["--text", "books", "--lengths", "256,512", *SMALL]
    result = run("longer", *arguments, "--json", "scores.json")
    assert result.exit_code == 2
    assert "whose --before differs: expected original, got none; ask for what it holds, or give" in result.stderr
    alone = [*arguments, "--sliding-windows", "0", "--json", "alone.json"]
    assert run("longer", *alone).exit_code == 0
    result = run("longer", *alone, "--before", "original")
    assert result.exit_code == 2 and "whose --before differs: expected none, got original;" in result.stderr


def test_weights_of_which_few_rows_differ_are_other_weights():
    config = dict(vocab_size=8192, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    before, after = ModelScores("a", "model"), ModelScores("a", "model")
    _describe(before, model)
    model.model.embed_tokens.weight.data[5] += 1.0
    _describe(after, model)
    assert before.weights != after.weights
