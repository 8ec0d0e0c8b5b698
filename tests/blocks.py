"""The code blocks of Markdown files, and how they run; changes with what a block may be.

Python and bash run as they stand, YAML and Python whose first line names a file go into that file ("continued": behind
what is in it), and a text block is what the block before it prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its code, and the line of its fence."""

    language: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in FENCED.finditer(text)]


def environment() -> dict[str, str]:
    """Where `longattn` and `python` are this Python's, and nothing is fetched."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": path}


def run(arguments: list[str], folder: Path) -> str:
    """Run a program in a folder; returns what it prints."""
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_python(code: str, folder: Path) -> str:
    return run([sys.executable, "-c", code], folder)


def run_bash(code: str, folder: Path) -> str:
    return run(["bash", "-euo", "pipefail", "-c", code], folder)


def run_page(page: Path, folder: Path) -> None:
    """Run all blocks of a page in their order, in one folder and one Python process of their own."""
    run([sys.executable, __file__, str(page)], folder)


def _own_lines(text: str) -> list[str]:
    """A text's lines without what torch before 2.11 prints where processes meet."""
    return [line for line in text.strip().splitlines() if not line.startswith("[Gloo] ")]


def _run_here(page: Path) -> None:
    module = sys.modules["page"] = ModuleType("page")  # dataclasses look for the module that they are defined in
    printed = None
    for block in blocks(page):
        place = f"{page.name}, line {block.line}"
        script = re.match(r"# (\S+\.py)(, continued)?\n", block.code)
        if block.language == "python" and script:
            with Path(script[1]).open("a" if script[2] else "w", encoding="utf-8") as file:
                file.write(block.code)
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                # blank lines in front, so that a traceback shows the page's own lines
                exec(compile("\n" * block.line + block.code, str(page), "exec"), vars(module))
            printed = output.getvalue()
        elif block.language == "bash":
            printed = run_bash(block.code, Path.cwd())
        elif block.language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", block.code)
            assert name, f"{place}: the first line of YAML must name its file"
            Path(name[1]).write_text(block.code, encoding="utf-8")
        else:
            assert block.language == "text", f"{place}: {block.language} is not run"
            assert printed is not None, f"{place}: no block before it prints it"
            shown, found = ("\n".join(map(str.rstrip, _own_lines(text))) for text in (block.code, printed))
            assert shown == found, f"{place} shows\n{shown}\nbut this was printed:\n{found}"
            printed = None


if __name__ == "__main__":
    _run_here(Path(sys.argv[1]))
