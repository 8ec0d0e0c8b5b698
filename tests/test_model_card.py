"""The model card that `extend` writes: read back, it says what the plan, `inspect` and the files say."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml
from checkpoints import edit_json, read_json, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

import longattn.checkpoint
from longattn.checkpoint import extend_checkpoint
from longattn.demo import MODEL_FOLDER
from longattn.model_card import _front_matter, _split, write_model_card
from longattn.plan import Plan
from longattn.plan_yaml import dump_yaml, load_yaml
from longattn.report import Report
from longattn.structure import inspect_checkpoint
from longattn.units import format_bytes, format_flops

ROPE = {"rope_type": "yarn", "factor": 4.0}
ALL = Plan(
    rope=ROPE,
    attention="2 x window:8+sinks:2, full",
    train_attention="group:8+shift",
    tokens={"tokens": {"pad_token": "<|pad|>", "extra_special_tokens": ["`", "```tool", "1e6"]}, "init": "mean"},
)
CARD = """---
# written by hand
license: other  # see LICENSE
language: [no, en]
tags:
  - code
model-index:
  - name: a
    results: []
base_model: them/theirs
---

# A model

It is good.
"""


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    src = write_checkpoint(tmp_path_factory.mktemp("model") / "src")
    (src / "README.md").write_text(CARD, encoding="utf-8")
    return src


@pytest.fixture(scope="module")
def dst(src):
    extend_checkpoint(src, src.with_name("long model"), ALL)
    return src.with_name("long model")


def card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def blocks(text, language):
    """The code of fenced blocks; a fence has as many backticks at its end as at its start."""
    return [code for _, code in re.findall(rf"^(`{{3,}}){language}\n(.*?)^\1$", text, re.MULTILINE | re.DOTALL)]


def tables(text):
    """Every table as rows of cells, without the line below its head."""
    found = [table.splitlines() for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)]
    cells = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in (head, *rows)] for head, _, *rows in found]
    return [[[cell.strip().replace("\\|", "|") for cell in row] for row in table] for table in cells]


def plan_in(code, tmp_path):
    (tmp_path / "plan.yaml").write_text(code, encoding="utf-8")
    return Plan.from_yaml(tmp_path / "plan.yaml")


def test_front_matter_is_kept_but_for_measured_results(dst):
    fields = front_matter(card(dst))
    assert fields == {
        "license": "other",
        "language": [False, "en"],
        "tags": ["code", "longattn"],
        "base_model": "them/theirs",
        "library_name": "transformers",
    }
    assert "# written by hand\nlicense: other  # see LICENSE\nlanguage: [no, en]\n" in card(dst)


def test_old_text_follows(dst):
    assert card(dst).endswith("\n\n# A model\n\nIt is good.\n")
    assert "Its card follows below." in card(dst) and card(dst).count("# A model") == 1
    assert "\n# long model\n" in card(dst)


def test_plan_reads_back(dst, tmp_path):
    (code,) = blocks(card(dst), "yaml")
    assert plan_in(code, tmp_path) == ALL


def test_table_has_what_inspect_finds(src, dst):
    before, after = inspect_checkpoint(dst)
    assert (before, after) == inspect_checkpoint(src, plan=ALL)
    head, *rows = tables(card(dst))[0]
    assert head == ["one text of 256 tokens", "before", "after"] and after.context == 256
    cells = {what: (old, new) for what, old, new in rows}
    assert cells["positions"] == ("64", "256")
    assert cells["attention"] == ("full", "2 x window:8+sinks:2, full, cycled over 4 layers")
    assert cells["attention in training"] == ("full", "group:8+shift")
    assert cells["rotary embedding"] == ("default", "yarn")
    assert cells["KV cache"] == tuple(format_bytes(s.costs.kv_cache_bytes) for s in (before, after))
    for what, cost in {"attention, whole text": "prefill_flops", "attention, last token": "decode_flops"}.items():
        assert cells[what] == tuple(format_flops(getattr(s.costs, cost)) for s in (before, after))


def test_table_has_the_new_tokens(dst):
    vocabulary = {entry["content"]: entry["id"] for entry in read_json(dst / "tokenizer.json")["added_tokens"]}
    _, *rows = tables(card(dst))[1]
    shown = {"`<|pad|>`": "<|pad|>", "`` ` ``": "`", "```` ```tool ````": "```tool", "`1e6`": "1e6"}
    assert [(int(number), shown[token], role) for number, token, role, *_ in rows] == [
        (vocabulary[token], token, "pad_token" if token == "<|pad|>" else "") for token in shown.values()
    ]
    assert all(how == "mean" for row in rows for how in row[3:])
    assert "60 tokens before, 64 after" in card(dst)


def run_loading(folder):
    (code,) = blocks(card(folder), "python")
    code += "print(sorted(name for name in sys.modules if name == 'longattn'), model.config._attn_implementation)"
    found = subprocess.run([sys.executable, "-c", "import sys\n" + code], cwd=folder, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_loading_code_runs_and_imports_longattn_where_that_is_needed(src, dst, tmp_path):
    assert run_loading(dst) == "['longattn'] longattn"
    extend_checkpoint(src, tmp_path / "rope", Plan(rope=ROPE))
    assert run_loading(tmp_path / "rope") == "[] sdpa"


def test_exported_checkpoint_says_what_it_is(tmp_path):
    plan = Plan(rope=ROPE, attention="window:8", train_attention="group:8+shift")
    extend_checkpoint(MODEL_FOLDER, tmp_path / "dst", plan, export="stock")
    assert run_loading(tmp_path / "dst") == "[] sdpa"
    rows = {row[0]: row[1:] for row in tables(card(tmp_path / "dst"))[0]}
    assert rows["attention"] == ["full", "window:8"] and "attention in training" not in rows
    assert "- train_attention" in card(tmp_path / "dst")  # the note on what is left out
    extend_checkpoint(MODEL_FOLDER, tmp_path / "again", Plan(train_attention="group:8"))
    extend_checkpoint(tmp_path / "again", tmp_path / "stock", None, export="stock")
    assert "### Plan 2\n\nNo plan: exported as it is." in card(tmp_path / "stock")
    assert run_loading(tmp_path / "stock") == "[] sdpa"


def test_second_plan_gets_a_section_after_the_first(dst, tmp_path):
    second = Plan(rope={"factor": 2.0}, tokens={"tokens": ["<tool>"]})
    extend_checkpoint(dst, tmp_path / "longer", second)
    text = card(tmp_path / "longer")
    assert [plan_in(code, tmp_path) for code in blocks(text, "yaml")] == [ALL, second]
    first = re.search(r"### Plan 1\n.*?(?=\n### Plan 2|\n<!-- longattn: end)", card(dst), re.DOTALL)[0]
    assert first.strip() in text and text.count("### Plan") == 2
    assert len(blocks(text, "python")) == text.count("# A model") == text.count("longattn: begin") == 1
    head, positions, *_ = tables(text.partition("### Plan 2")[2])[0]
    assert head[0] == "one text of 512 tokens" and positions == ["positions", "256", "512"]
    assert front_matter(text)["tags"] == ["code", "longattn"]
    assert "import longattn" in text  # the first plan's attention is still there


def test_checkpoint_without_card_gets_one(tmp_path):
    extend_checkpoint(MODEL_FOLDER, tmp_path / "dst", Plan(tokens={"tokens": ["<a>"]}))
    text = card(tmp_path / "dst")
    assert front_matter(text) == {"library_name": "transformers", "tags": ["longattn"]}
    assert "Layers, rotary embedding and length are as they were." in text
    assert "Its card follows" not in text and text.endswith("longattn: end -->\n")
    assert str(MODEL_FOLDER) not in text


def test_hub_id_is_the_base_model(src, tmp_path, monkeypatch):
    monkeypatch.setattr(longattn.checkpoint, "source_folder", lambda *_: src)  # what the Hub would have given
    extend_checkpoint("us/ours", tmp_path / "dst", Plan(rope=ROPE))
    assert front_matter(card(tmp_path / "dst"))["base_model"] == "us/ours"
    assert "Made from [us/ours](https://huggingface.co/us/ours)" in card(tmp_path / "dst")


def test_initialisers_of_python_are_named(src, tmp_path):
    import torch

    tokens = {"tokens": ["<a>"], "init": torch.zeros(1, 32), "output_init": lambda token, rows: rows[0]}
    extend_checkpoint(src, tmp_path / "dst", Plan(tokens=tokens))
    assert "What Python code gave stands in it as callable and tensor" in card(tmp_path / "dst")


def test_uneven_layers_are_listed(src, tmp_path):
    extend_checkpoint(src, tmp_path / "dst", Plan(attention="window:8, full"))
    row = next(row for row in tables(card(tmp_path / "dst"))[0] if row[0] == "attention")
    assert row == ["attention", "full", "window:8, full, cycled over 4 layers"]


@pytest.mark.parametrize("broken", ["---\nlicense: [mit\n---\nText.\n", "---\n- a\n---\nText.\n", "---\nText.\n"])
def test_front_matter_that_is_none_stays_text(tmp_path, broken):
    (tmp_path / "README.md").write_text(broken, encoding="utf-8")
    edit = {"model_type": "llama"}
    (tmp_path / "config.json").write_text("{}")
    edit_json(tmp_path / "config.json", **edit)
    write_model_card(tmp_path, MODEL_FOLDER, Plan(rope=ROPE), Report(), name="a", base_model=None)
    assert front_matter(card(tmp_path)) == {"library_name": "transformers", "tags": ["longattn"]}
    assert card(tmp_path).endswith(broken)


def test_bytes_that_are_no_text_stay(tmp_path):
    (tmp_path / "README.md").write_bytes(b"caf\xe9\n")
    (tmp_path / "config.json").write_text("{}")
    write_model_card(tmp_path, MODEL_FOLDER, Plan(rope=ROPE), Report(), name="a", base_model=None)
    assert (tmp_path / "README.md").read_bytes().endswith(b"\n\ncaf\xe9\n")


SCALARS = st.one_of(st.text(max_size=8), st.integers(), st.booleans(), st.floats(allow_nan=False), st.none())
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=5), SCALARS, max_size=3))


@given(st.dictionaries(st.text(min_size=1, max_size=8), VALUES, max_size=4), st.booleans())
def test_other_entries_mean_what_they_meant(fields, flow):
    stored = yaml.safe_dump(fields, sort_keys=False, default_flow_style=flow)
    front, _ = _split(f"---\n{stored}---\n")
    assert yaml.safe_load(_front_matter(front, None)) == {
        **fields,
        "library_name": "transformers",
        "tags": ["longattn"],
    }


@given(VALUES)
def test_dumped_yaml_loads(value):
    assert load_yaml(dump_yaml(value), "test") == value
