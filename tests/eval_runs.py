"""Runs of `longattn eval` on the shipped model, before and after a change, and what they read."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longattn.checkpoint import extend_checkpoint
from longattn.cli import app
from longattn.demo import MODEL_FOLDER
from longattn.demo.text import read_documents
from longattn.plan import Plan

SMALL = ("--last", "32", "--windows", "3", "--sliding-windows", "2", "--stride", "64", "--trials", "1")


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], prog_name="longattn")


def write_folder(top: Path) -> Path:
    """`original`, `longer` with windows and a token that is scored, `books` of three texts that were not trained on."""
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


def run_everything(folder: Path):
    """One run before and after with everything, in text, JSON and HTML."""
    arguments = ["longer", "--before", "original", "--text", "books", "--lengths", "256,512", "--retrieval", "passkey"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run(*arguments, *SMALL, "--depths", "0.5,1", "--json", "scores.json", "--report", "report.html")
    assert result.exit_code == 0, result.output
    return result
