"""The demo's whole course at a small setting, on the shipped model and this Python's own standard library."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console
from transformers import AutoTokenizer, LlamaForCausalLM

from longattn.demo import MODEL_FOLDER
from longattn.demo.findings import findings
from longattn.demo.finetune import token_stream
from longattn.demo.methods import NEW_TOKENS, ROPE_METHODS, rope_changes
from longattn.demo.plots import write_plots
from longattn.demo.report import print_results
from longattn.demo.results import Row
from longattn.demo.run import Settings, run_demo
from longattn.demo.text import is_scored, read_documents
from longattn.evaluate import encode
from longattn.text import Document

SPLIT = [True, False, False, False]
SETTINGS = Settings(methods=("linear", "yarn"), windows=6, tune_steps=2, tune_batch=1, tune_chars=30_000, new_tokens=8)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run on two processes, and all the work that it reported."""
    out, work = tmp_path_factory.mktemp("demo") / "out", []
    results = run_demo(out, SETTINGS, workers=2, progress=lambda doing, amount: work.append(amount))
    return out, results, sum(work)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


def test_split_is_disjoint_and_covers_the_library():
    scored = {doc.name for doc in read_documents(scored=True)}
    trained = {doc.name for doc in read_documents(scored=False)}
    assert not scored & trained
    assert 0.08 < len(scored) / len(scored | trained) < 0.28
    assert {"contextlib.py", "json/decoder.py"} <= scored | trained


def test_split_depends_on_the_name_alone(tmp_path):
    """These are fixed: what the shipped model was trained on must be trained text on every machine."""
    assert [is_scored(name) for name in ("posixpath.py", "keyword.py", "argparse.py", "json/decoder.py")] == SPLIT
    for name in ("posixpath.py", "argparse.py"):
        (tmp_path / name).write_text("x = 1\n" * 3)
    both = [*read_documents(scored=True, root=tmp_path), *read_documents(scored=False, root=tmp_path)]
    assert {doc.name: is_scored(doc.name) for doc in both} == {"posixpath.py": SPLIT[0], "argparse.py": SPLIT[2]}


def test_split_leaves_installed_and_generated_files_out(tmp_path):
    for name in ("site-packages/a.py", "test/b.py", "_sysconfigdata_x.py", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    for scored in (True, False):
        with pytest.raises(ValueError, match="demo: no Python source with at least 1 characters to read under"):
            read_documents(scored=scored, root=tmp_path)


def test_tokenizer_has_a_byte_a_token_and_gives_text_back(tokenizer):
    text = "dèf f(x):\n\treturn ✓ \x00\x7f\r\n"
    assert encode(tokenizer, text) == list(text.encode())
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert encode(tokenizer, f"a{tokenizer.eos_token}b") == [97, 256, 98]


def test_stream_ends_each_document_and_stops(tokenizer):
    docs = [Document("a", "ab"), Document("b", "c" * 50), Document("c", "never")]
    stream = token_stream(docs, tokenizer, max_chars=6, max_chars_of_one=5)
    assert bytes(stream[stream != 256].tolist()) == b"abccccc"
    assert (stream == 256).nonzero().flatten().tolist() == [2, 8]


def test_unchanged_model_fails_beyond_its_length_and_yarn_holds(demo):
    _, results, _ = demo
    none, yarn, linear = (results.row(name).zero_shot for name in ("none", "yarn", "linear"))
    assert none[256] < 6
    assert none[1024] > 3 * none[256]
    assert yarn[1024] < none[1024] / 3
    assert yarn[1024] < 2 * none[256]
    assert linear[1024] > 2 * yarn[1024]


def test_windows_and_groups_hold_where_full_attention_fails(demo):
    _, results, _ = demo
    none = results.row("none").zero_shot
    for name in ("window:256", "group:256+shift"):
        scores = results.row(name).zero_shot
        assert scores[2048] < 1.3 * none[256] < none[2048] / 3
    # a window as long as the text is full attention
    assert results.row("window:256").zero_shot[256] == pytest.approx(none[256], rel=1e-3)


def test_tuning_moves_the_scores_and_trains_in_the_plan_s_pattern(demo):
    _, results, _ = demo
    assert len(results.row("linear").losses) == SETTINGS.tune_steps
    assert results.row("linear").tuned[1024] < 0.95 * results.row("linear").zero_shot[1024]
    full, grouped = results.row("yarn"), results.row("yarn trained in group:256+shift")
    assert grouped.zero_shot == pytest.approx(full.zero_shot, rel=1e-3)  # served alike
    assert abs(grouped.losses[0] - full.losses[0]) > 1e-4  # trained otherwise


def test_new_tokens_are_one_id_with_a_row(demo):
    out, results, _ = demo
    tokens = results.tokens
    assert list(tokens.ids) == list(NEW_TOKENS)
    for token, (before, after) in tokens.encoded.items():
        assert (bytes(before).decode(), after) == (token, [tokens.ids[token]])
        assert 0.05 < tokens.row_norms[token] / tokens.mean_row_norm < 1.5
    assert tokens.loss_tuned < tokens.loss_zero_shot
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoints/everything-tuned")
    assert tokenizer.decode(encode(tokenizer, "return self.x")) == "return self.x"
    assert [one.model for one in results.continuations] == ["original", "everything-tuned", "everything-tuned"]


def test_rope_checkpoints_load_in_plain_transformers(demo):
    out, _, _ = demo
    model = LlamaForCausalLM.from_pretrained(out / "checkpoints/yarn")
    assert model.config.max_position_embeddings == 1024
    assert model.config._attn_implementation != "longattn"


def test_files_hold_the_numbers_and_the_pictures(demo):
    out, results, work = demo
    stored = json.loads((out / "results.json").read_text())
    assert stored["complete"] and stored["findings"] == results.findings
    assert [row["zero_shot"]["1024"] for row in stored["rows"]] == [row.zero_shot[1024] for row in results.rows]
    for picture in write_plots(results, out):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert work == pytest.approx(SETTINGS.work())


def test_table_names_each_method_and_its_numbers(demo):
    _, results, _ = demo
    console = Console(width=100, record=True, file=io.StringIO())
    print_results(results, console)
    text = console.export_text()
    for row in results.rows:
        line = next(line for line in text.splitlines() if line.split()[:1] == row.name.split()[:1] and row.name in line)
        assert f"{row.zero_shot[1024]:.2f}" in line


def test_findings_follow_the_numbers(demo):
    """With the two methods' rows exchanged, the sentences say the opposite."""
    _, results, _ = demo
    linear, yarn = results.row("linear"), results.row("yarn")
    assert "yarn" in findings(results)[1].split("hold")[0] and "linear" not in findings(results)[1].split("hold")[0]
    exchanged = [
        Row("yarn", "rope", row.plan, row.zero_shot, row.tuned)
        if row is linear
        else Row("linear", "rope", row.plan, row.zero_shot, row.tuned)
        if row is yarn
        else row
        for row in results.rows
    ]
    sentence = findings(replace(results, rows=exchanged))[1]
    assert "linear" in sentence.split("hold")[0] and "yarn" not in sentence.split("hold")[0]


def test_every_method_makes_a_plan_and_others_are_refused():
    assert [change.name for change in rope_changes(ROPE_METHODS, 256, 4)] == ["none", *ROPE_METHODS]
    with pytest.raises(ValueError, match="demo: methods must be of linear, .*, got 'cope'"):
        rope_changes(["cope"], 256, 4)


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine").write_text("x")
    with pytest.raises(ValueError, match="demo: --out must be new, empty, or written by an earlier demo, got"):
        run_demo(tmp_path, SETTINGS, workers=2)
    assert (tmp_path / "checkpoints" / "mine").read_text() == "x"
