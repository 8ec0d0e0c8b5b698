"""`longattn eval`: numbers are those of the functions, what is left out is said, what can't be measured is refused."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("transformers")

import torch
from eval_runs import SMALL, run, run_everything, write_folder
from hf_models import build, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from longattn.cli.eval import parse_lengths
from longattn.cli.eval_tables import tables
from longattn.evaluate import TASKS, evaluate_retrieval, score_last, windows_at
from longattn.evaluate.page import page_of
from longattn.evaluate.results import Settings, read_evaluation
from longattn.evaluate.retrieval import questions
from longattn.evaluate.run import evaluate, work_of
from longattn.text import Document, load_documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def done(folder):
    return run_everything(folder)


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
        (
            ["--lengths", "100", "--retrieval", "multikey"],
            "lengths must be at least .* take, [0-9]+ for multikey, .* got 100",
        ),
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


def test_model_without_a_tokenizer_is_refused(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    build("qwen2").save_pretrained(tmp_path)  # for which transformers makes a tokenizer that knows no word
    result = run(str(tmp_path), "--text", "books", "--lengths", "256", *SMALL)
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert f"longattn eval: model {tmp_path} must be a checkpoint's folder with a tokenizer" in result.stderr


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
    with pytest.raises(ValueError, match=f"as the questions take, [0-9]+ for multikey, .* got {shortest}"):
        documents = list(load_documents(folder / "books"))
        models = [("model", str(folder / "original"))]
        evaluate(models, documents, settings, text_name="a", progress=lambda doing, tokens: done.append(doing))
    assert not done


def test_all_tasks_say_at_once_what_lengths_they_need(folder, monkeypatch):
    monkeypatch.chdir(folder)
    flags = ["--text", "books", "--retrieval", "passkey,multikey", *SMALL]
    refused = run("original", "--lengths", "64,4k", *flags)
    assert refused.exit_code == 2
    least = re.findall(r"(\d+) for (passkey|multikey)", refused.stderr)
    assert [task for _, task in least] == ["passkey", "multikey"] and refused.stderr.endswith("got 64\n")
    lengths = sorted(int(tokens) for tokens, _ in least)
    again = run("original", "--lengths", str(lengths[0]), *flags)
    assert re.findall(r"\d+ for (\w+key)", again.stderr) == ["multikey"]
    assert run("original", "--lengths", str(lengths[1]), *flags).exit_code == 0


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
