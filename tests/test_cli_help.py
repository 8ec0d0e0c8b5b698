"""The help of every command: what each flag does, the main ones by an example, and nothing lost as markup."""

import re
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from longattn.cli import app
from longattn.cli.commands import COMMANDS, _load
from longattn.cli.plan_flags import errors_in_one_line

WITH_EXAMPLES = ("extend", "train", "inspect", "eval", "plot")


def shown(name):
    """A command's help without the lines and boxes that it is set in."""
    result = CliRunner().invoke(app, [name, "--help"], prog_name="longattn")
    return re.sub(r"[\s│]+", " ", result.output)


def flags(name):
    """(command, option) of a command and of those below it, but for --help."""
    loaded = _load(name)
    commands = getattr(loaded, "commands", {name: loaded})
    found = [(command, param) for command in commands.values() for param in command.params]
    return [(command, param) for command, param in found if param.name != "help"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_a_help_text(name):
    missing = [param.name for _, param in flags(name) if not getattr(param, "help", None)]
    assert missing == []


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_flags_are_explained_by_an_example(name):
    for command, param in flags(name):
        if param.param_type_name != "option":
            continue
        flag = param.opts[0]
        text = param.help.replace("\\[", "[").partition(" (default")[0]
        assert f"{flag} " in f"{text} ", f"{command.name} {flag}: {text}"
        example = shlex.split(text[text.rindex(flag) :])
        assert param.is_flag or not example[1].startswith("-")


def test_brackets_are_no_markup():
    assert "--attention '[full, window:4096]'" in shown("extend")


def test_arguments_are_called_as_in_the_texts():
    for name, usage in {"extend": r"\{?SRC\}? \[DST\]", "inspect": r"\{?SRC\}?"}.items():
        assert re.search(f"longattn {name} \\[OPTIONS\\] {usage}", shown(name))


def test_python_m_longattn_is_called_longattn():
    done = subprocess.run([sys.executable, "-m", "longattn", "no-such-command"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Usage: longattn [OPTIONS] COMMAND" in done.stderr and "No such command 'no-such-command'" in done.stderr


def test_a_reader_that_goes_is_no_error_to_be_told():
    with pytest.raises(BrokenPipeError), errors_in_one_line("extend"):
        raise BrokenPipeError
