"""The command line's frame, and longattn doctor."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
from typer.testing import CliRunner  # noqa: E402

import longattn  # noqa: E402
from longattn.cli import app  # noqa: E402
from longattn.cli.commands import COMMANDS  # noqa: E402


def invoke(*arguments):
    return CliRunner().invoke(app, arguments)


def test_help_lists_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(f" {command} " in result.output for command in COMMANDS)


def test_help_imports_no_command():
    code = (
        "import sys; sys.argv = ['longattn', '--help']\nfrom longattn.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'transformers', 'matplotlib', 'longattn.cli.doctor'} & set(sys.modules)\nassert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_misspelt_command_is_answered_with_the_right_one():
    result = invoke("docter")
    assert result.exit_code == 2 and "'doctor'" in result.output


def test_a_missing_extra_is_one_line_with_the_command_that_mends_it(tmp_path):
    code = (
        "import sys; sys.modules['typer'] = None\nfrom longattn.cli import main\nmain()"  # None: an import of it fails
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "longattn: this needs typer: pip install 'longattn[cli]'"
    assert "Traceback" not in result.stderr


def test_python_m_longattn_is_the_console_script():
    result = subprocess.run([sys.executable, "-m", "longattn", "--version"], capture_output=True, text=True)
    assert result.stdout == f"longattn {longattn.build_info()['longattn']}\n", result.stderr


def test_doctor_shows_every_op_and_its_path():
    result = invoke("doctor", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["facts"]["torch"] == longattn.build_info()["torch"]
    served = {(row["op"], row["device"], row["dtype"]): row for row in report["paths"]}
    assert {op for op, _, _ in served} == {"apply_rope", "apply_rope_positions", "window_attention", "group_attention"}
    assert served["apply_rope", "cpu", "float16"]["path"] == "pure"
    expected = "compiled" if longattn.build_info()["compiled"] else "pure"
    assert served["apply_rope", "cpu", "float32"]["path"] == expected
    assert any(device == "cuda" for _, device, _ in served)


def test_doctor_prints_tables():
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "This installation" in result.output and "What serves each op" in result.output
