"""Every Python block and every command of the README runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from blocks import blocks, run_bash, run_python

from longattn.demo import MODEL_FOLDER

BLOCKS = blocks(Path(__file__).parents[1] / "README.md")
PYTHON = [block.code for block in BLOCKS if block.language == "python"]
# pip commands are what brought this test here; the bench, the demo and the docs have tests of their own
COMMANDS = [
    line
    for block in BLOCKS
    if block.language == "bash"
    for line in block.code.splitlines()
    if line.startswith("longattn") and not re.match(r"longattn (bench|demo)", line)
]
PLAN = next(block.code for block in BLOCKS if block.language == "yaml")


def test_readme_has_what_is_tested():
    assert len(PYTHON) >= 2 and len(COMMANDS) >= 6


@pytest.mark.parametrize("code", PYTHON)
def test_python_block_runs(code, tmp_path):
    run_python(code, tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN, encoding="utf-8")
    (tmp_path / "SRC").symlink_to(MODEL_FOLDER)
    (tmp_path / "docs").symlink_to(Path(__file__).parents[1] / "docs")
    run_bash(command, tmp_path)
