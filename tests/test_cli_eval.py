"""`longattn eval`: numbers are those of the functions, a stopped run goes on, what can't be measured is refused."""

from __future__ import annotations

import json
import re
import shutil

import pytest

pytest.importorskip("transformers")

import torch
from hf_models import build, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from longattn.checkpoint import extend_checkpoint
from longattn.cli import app
from longattn.cli.eval import parse_lengths
from longattn.cli.eval_tables import tables
from longattn.demo import MODEL_FOLDER
from longattn.demo.text import read_documents
from longattn.evaluate import TASKS, evaluate_retrieval, score_last, windows_at
from longattn.evaluate.page import page_of
from longattn.evaluate.results import ModelScores, Settings, read_evaluation
from longattn.evaluate.retrieval import questions
from longattn.evaluate.run import _describe, evaluate, work_of
from longattn.plan import Plan
from longattn.text import Document, load_documents

SMALL = ("--last", "32", "--windows", "3", "--sliding-windows", "2", "--stride", "64", "--trials", "1")


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], prog_name="longattn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`original`, `longer` with windows and a token that is scored, `books` of three texts that were not trained on."""
    top = tmp_path_factory.mktemp("eval")
    texts = [doc.text[:3000] for doc in read_documents(scored=True, min_chars=3000)[:3]]
    (top / "books").mkdir()
    for number, text in enumerate(texts):
        (top / "books" / f"{number}.txt").write_text(text, encoding="utf-8")
    word = next(found[0] for text in texts if (found := re.findall(r"(?<=\W)[a-z]{2,}(?=\W)", text[-30:])))
    shutil.copytree(MODEL_FOLDER, top / "original")
    tokens = {"tokens": [word], "special": False}
    plan = Plan(rope={"rope_type": "yarn", "factor": 4.0}, attention="window:64+sinks:4", tokens=tokens)
    extend_checkpoint(top / "original", top / "longer", plan)
    return top


@pytest.fixture(scope="module")
def done(folder):
    """One run before and after with everything, in text, JSON and HTML."""
    arguments = ["longer", "--before", "original", "--text", "books", "--lengths", "256,512", "--retrieval", "passkey"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run(*arguments, *SMALL, "--depths", "0.5,1", "--json", "scores.json", "--report", "report.html")
    assert result.exit_code == 0, result.output
    return result


def test_lengths_are_read_as_people_write_them():
    assert parse_lengths("4k, 512,1M,4096") == [512, 4096, 1 << 20]
    for text in ("4x", "", "0", "1.5k", "-3", "4k,,8k"):
        with pytest.raises(ValueError, match="--lengths must be like 4k,8k or 512,1024, got"):
            parse_lengths(text)


def test_numbers_are_those_of_the_functions(folder, done):
    evaluation = read_evaluation(folder / "scores.json")
    before, after = evaluation.models
    assert evaluation.complete and (before.role, after.role) == ("before", "after")
    texts = {path.name: path.read_text(encoding="utf-8") for path in (folder / "books").iterdir()}
    for scores in (before, after):
        name = folder / scores.name
        model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        ends = [(Document(name, text), len(text)) for name, text in texts.items()]
        for score in scores.last:
            chars = evaluation.models[0].last[0].num_bytes // 3
            windows = list(windows_at(ends, tokenizer, longest=512, target_chars=chars))
            assert score == score_last(model, windows, score.context)
        cells = evaluate_retrieval(model, tokenizer, [TASKS["passkey"]], [512], depths=[0.5, 1.0], trials=1)
        assert [cell for cell in scores.cells if cell.length == 512] == cells
    # both were scored on the same text
    assert before.score(256).num_bytes == after.score(256).num_bytes
    assert before.score(256).tokens > after.score(256).tokens
    assert after.plans[0]["attention"] == "window:64+sinks:4" and before.plans == []


def test_tables_show_what_json_holds(folder, done):
    evaluation = read_evaluation(folder / "scores.json")
    for model in evaluation.models:
        for value in [*(s.perplexity for s in model.last), *(s.longlora for s in model.sliding)]:
            assert f" {value:.2f} " in done.stdout or f" {value:.1f} " in done.stdout
    assert "passkey, after: answered exactly of 1" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["wrote scores.json", "wrote report.html"]
    assert (folder / "report.html").read_text(encoding="utf-8") == page_of(evaluation)


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--lengths", "256,4k"], "--text must hold one text of at least 4,096 tokens, the longest of --lengths, got"),
        (["--lengths", "16"], r"lengths must be above the last 32 tokens, which are scored, got 16; .*\(--last\)"),
        (["--retrieval", "needle"], "retrieval must be of passkey, multikey, got 'needle'"),
        (["--retrieval", "passkey,passkey"], "retrieval must name each task once, got passkey, passkey"),
        (["--text", "nowhere"], "--text must be a file or a folder, got 'nowhere', which is not there"),
        (["--depths", "0,2"], "--depths must be 0 to 1, got '0,2'"),
        (["--dtype", "int8"], "--dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
        (["--device", "tpu"], "--device must be cpu or cuda and be here, got 'tpu'"),
        (["--report", "no/where.html"], "--report must be a file in a folder that is there, got 'no/where.html'"),
        (["--trials", "0"], "trials must be at least 1, got 0"),
        (["--lengths", "100", "--retrieval", "multikey"], "multikey: length must be at least .* tokens .*, got 100"),
    ],
)
def test_refusals_say_what_was_expected(folder, monkeypatch, changed, message):
    monkeypatch.chdir(folder)
    result = run("original", "--text", "books", "--lengths", "256", *SMALL, *changed)
    assert result.exit_code == 2
    assert re.search(f"^longattn eval: .*{message}", result.stderr), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stdout == ""


def test_model_that_is_not_there_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("books", "--text", "books", "--lengths", "256", *SMALL)
    assert result.exit_code == 2
    assert "longattn eval: model books must be a checkpoint's folder with a tokenizer" in result.stderr


def test_short_texts_can_be_joined(folder, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = ["original", "--text", "books", "--lengths", "4k", *SMALL, "--sliding-windows", "0"]
    assert "--join makes one text of all" in run(*arguments).stderr
    result = run(*arguments, "--join", "--windows", "1")
    assert result.exit_code == 0, result.output


def test_function_reports_all_its_work(folder):
    settings = Settings([128], last=32, windows=2, sliding_windows=1, depths=[0.5], trials=1)
    work = []
    evaluation = evaluate(
        [("model", str(folder / "original"))],
        list(load_documents(folder / "books")),
        settings,
        text_name="books",
        progress=lambda doing, tokens: work.append(tokens),
    )
    assert sum(work) == work_of(settings, 1)
    assert evaluation.models[0].score(128).windows == 2 and evaluation.models[0].score(64) is None


def test_scored_tokens_that_fill_the_shortest_length_are_refused_as_such(folder):
    tokenizer = build_tokenizer()
    build("llama", torch.float32).save_pretrained(folder / "words")
    tokenizer.save_pretrained(folder / "words")
    text = " ".join(f"w{i % 50}" for i in range(300)) + " " + " ".join(f"w{i % 9}" for i in range(100))
    settings = Settings([33, 48], last=32, windows=1, sliding_windows=0)
    with pytest.raises(ValueError, match=r"lengths must hold all that is scored, got 33 tokens where .*\(--last\)"):
        evaluate([("model", str(folder / "words"))], [Document("a", text)], settings, text_name="a")


def test_every_question_is_tried_before_anything_is_measured(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "original")
    shortest = 400
    while True:
        try:
            for _ in questions(TASKS["multikey"], tokenizer, shortest, 0.5, 1, 0):
                break
            break
        except ValueError:
            shortest += 1
    settings = Settings([shortest], last=32, windows=1, sliding_windows=0, tasks=["multikey"], depths=[0.5], trials=20)
    done = []
    with pytest.raises(ValueError, match="multikey: length must be at least"):
        documents = list(load_documents(folder / "books"))
        models = [("model", str(folder / "original"))]
        evaluate(models, documents, settings, text_name="a", progress=lambda doing, tokens: done.append(doing))
    assert not done


@pytest.mark.parametrize(("lengths", "shown"), [([64, 128], "stride 63 at 64, 64 at 128"), ([65, 128], "stride 64")])
def test_strides_shown_are_those_that_were_used(folder, lengths, shown):
    settings = Settings(lengths, last=16, windows=1, sliding_windows=2, stride=64)
    documents = list(load_documents(folder / "books"))
    evaluation = evaluate([("model", str(folder / "original"))], documents, settings, text_name="a")
    assert [score["stride"] for score in evaluation.to_dict()["models"][0]["sliding"]] == [min(64, lengths[0] - 1), 64]
    titles = [str(part) for table in tables(evaluation) for part in table.renderables]
    assert any(title.endswith(f", {shown}") for title in titles)
    assert f">{shown.capitalize()}; windows:" in page_of(evaluation)


def test_pieces_that_are_left_out_are_counted(folder):
    """The end of one text has more tokens than the shortest length holds, as its words are shorter than the mean."""
    build("llama", torch.float32).save_pretrained(folder / "dense")
    build_tokenizer().save_pretrained(folder / "dense")
    even, dense = " ".join(f"w{i % 50}" for i in range(500)), " ".join(f"w{i % 9}" for i in range(300))
    documents = [Document("even", even), Document("dense", dense)]
    settings = Settings([34, 48], last=32, windows=2, sliding_windows=0)
    evaluation = evaluate([("model", str(folder / "dense"))], documents, settings, text_name="a")
    assert (evaluation.text["pieces"], evaluation.text["pieces_left_out"]) == (1, 1)
    said = "1 pieces (1 more did not fit the lengths)"
    titles = [str(part) for table in tables(evaluation) for part in table.renderables]
    assert f"of {said} of text" in titles[0] and f"{said} of a," in page_of(evaluation)
    evenly = evaluate([("model", str(folder / "dense"))], documents[:1], settings, text_name="a")
    assert evenly.text["pieces_left_out"] == 0 and "did not fit" not in page_of(evenly)


def test_model_without_rope_is_measured_too(folder):
    config = GPT2Config(vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    build_tokenizer().save_pretrained(folder / "gpt2")
    documents = [Document("a", " ".join(f"w{i % 50}" for i in range(600)))]
    settings = Settings([64, 128], last=16, windows=2, sliding_windows=1)
    evaluation = evaluate([("model", str(folder / "gpt2"))], documents, settings, text_name="a")
    assert evaluation.models[0].facts["rope"] == "none" and evaluation.models[0].score(128).perplexity > 1
