"""The pages in docs/: their code runs as it stands, and Sphinx builds them without a warning."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import blocks, run_page
from typer.testing import CliRunner

from longattn.cli import app
from longattn.demo import MODEL_FOLDER

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
JOBS = (
    "extend-context",
    "windows",
    "longlora",
    "training",
    "distributed",
    "tokens",
    "evaluation",
    "patterns",
    "serving",
)


def test_every_job_has_a_page_with_code():
    assert {page.stem for page in PAGES if blocks(page)} >= set(JOBS)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_code_of_page_runs(page, tmp_path):
    if page.stem != "index":
        (tmp_path / "SRC").symlink_to(MODEL_FOLDER)
    run_page(page, tmp_path)


def test_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        tmp_path / "trees",
        DOCS,
        tmp_path / "html",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        assert (tmp_path / "html" / f"{page.stem}.html").is_file()


def keys_of(value, prefix=""):
    """Every key of nested JSON, as the pages write it: `layers[].heads`."""
    if isinstance(value, list):
        return {key for entry in value for key in keys_of(entry, f"{prefix}[]")}
    if not isinstance(value, dict):
        return set()
    below = {key for name, entry in value.items() for key in keys_of(entry, f"{prefix}.{name}" if prefix else name)}
    return below | {f"{prefix}.{name}" if prefix else name for name in value}


def documented_keys(heading):
    section = (DOCS / "commands.md").read_text(encoding="utf-8").partition(f"## `{heading}`")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {key for cell in cells for key in re.findall(r"`(.+?)`", cell)}


def json_of(*arguments):
    return json.loads(CliRunner().invoke(app, arguments).stdout)


def test_json_of_inspect_is_documented_key_by_key():
    printed = json_of("inspect", str(MODEL_FOLDER), "--attention", "window:8", "--json")
    assert printed.keys() == {"before", "after"}
    for structure in printed.values():
        top = {"layers", "costs"}
        assert keys_of(structure) - top == documented_keys("inspect --json") - top


def test_json_of_inspect_over_ranks_is_documented_key_by_key():
    printed = json_of("inspect", str(MODEL_FOLDER), "--attention", "window:8", "--ranks", "2", "--json")["ranks"]
    documented = documented_keys("inspect --ranks --json")
    assert {key for key in documented if "[]" not in key} >= {"link", "flops", "full"}
    for name in ("before", "after"):
        steps = {"forward", "training", "checkpointed"}
        assert keys_of(printed[name]) - steps == documented - {"link", "flops", "full"}


def test_json_of_eval_is_documented_key_by_key(tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 60, encoding="utf-8")
    small = "--last 8 --windows 1 --sliding-windows 1 --retrieval passkey --trials 1 --depths 1 --lengths 400"
    where = ["--text", str(tmp_path / "text.txt"), "--json", str(tmp_path / "scores.json")]
    done = CliRunner().invoke(app, ["eval", str(MODEL_FOLDER), *where, *small.split()])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    for opaque in (written, *written["models"]):
        opaque.update({name: 0 for name in ("machine", "facts", "plans") if name in opaque})
    groups = {"settings", "text", "models", "models[].last", "models[].sliding", "models[].cells"}
    assert keys_of(written) - groups == documented_keys("eval --json")


def test_json_of_doctor_is_documented_key_by_key():
    printed = keys_of(json_of("doctor", "--json"))
    documented = documented_keys("doctor --json")
    assert documented - {"paths", "families"} <= printed
    undocumented = {key for key in printed - documented if not key.startswith("facts.built.")}
    assert undocumented == {"facts"}
