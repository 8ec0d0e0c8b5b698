"""`longattn extend`: flags, YAML and Python make one plan; what is printed, written and refused."""

import pytest
import typer
from checkpoints import read_json
from transformers import AutoTokenizer
from typer.testing import CliRunner

from longattn.cli import extend as command
from longattn.cli.extend import extend
from longattn.plan import Plan

runner = CliRunner()
app = typer.Typer()
app.command()(extend)

YAML = """
rope: {rope_type: yarn, factor: 8, beta_fast: 16, rope_theta: 1e6}
context: 32768
attention: 3 x window:4096+sinks:4, 1 x full
train_attention: [group:2048+shift, full]
tokens:
  tokens: ["<tool>", "</tool>"]
  init: {"<tool>": a tool is called, "</tool>": the call ends}
  output_init: mean
  special: false
  pad_to_multiple_of: 64
"""
FLAGS = [
    *["--rope-type", "yarn", "--factor", "8", "--rope", "beta_fast=16", "--rope", "rope_theta=1e6"],
    *["--context", "32768", "--attention", "3 x window:4096+sinks:4, 1 x full"],
    *["--train-attention", "[group:2048+shift, full]", "--add-token", "<tool>", "--add-token", "</tool>"],
    *["--token-init", "<tool>=a tool is called", "--token-init", "</tool>=the call ends"],
    *["--token-output-init", "mean", "--plain", "--pad-to-multiple-of", "64"],
]

pytestmark = pytest.mark.usefixtures("src_is_untouched")


def plan_of(monkeypatch, arguments):
    """The plan that the command hands over, and the folders."""
    plans = []
    monkeypatch.setattr("longattn.checkpoint.preview_checkpoint", lambda src, plan, **rest: plans.append(plan))
    result = runner.invoke(app, ["src", *arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    return plans[0]


def test_flags_yaml_and_python_make_the_same_plan(monkeypatch, tmp_path):
    (tmp_path / "plan.yaml").write_text(YAML)
    python = Plan(
        rope={"rope_type": "yarn", "factor": 8.0, "beta_fast": 16, "rope_theta": 1e6},
        context=32768,
        attention="3 x window:4096+sinks:4, 1 x full",
        train_attention=["group:2048+shift", "full"],
        tokens={
            "tokens": ["<tool>", "</tool>"],
            "init": {"<tool>": "a tool is called", "</tool>": "the call ends"},
            "output_init": "mean",
            "special": False,
            "pad_to_multiple_of": 64,
        },
    )
    assert plan_of(monkeypatch, FLAGS) == python
    assert plan_of(monkeypatch, ["--plan", str(tmp_path / "plan.yaml")]) == python


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--context", "8192"], {"context": 8192}),
        (["--rope", "full_attention.factor=4"], {"rope": {"full_attention": {"factor": 4}}}),
        (["--rope", "long_factor=[1.0, 2.0]"], {"rope": {"long_factor": [1.0, 2.0]}}),
        (
            ["--add-token", "pad_token=<pad>", "--add-token", "<tool>", "--token-init", "copy:</s>"],
            {"tokens": {"tokens": {"pad_token": "<pad>", "extra_special_tokens": ["<tool>"]}, "init": "copy:</s>"}},
        ),
        (["--add-token", "<a=b>"], {"tokens": {"tokens": ["<a=b>"]}}),
    ],
)
def test_flags_make_parts_of_a_plan(monkeypatch, flags, parts):
    assert plan_of(monkeypatch, flags) == Plan(**parts)


def test_extend_writes_checkpoint_and_prints_report(src, tmp_path):
    dst = tmp_path / "dst"
    flags = ["--rope-type", "yarn", "--factor", "4", "--attention", "window:8", "--add-token", "<tool>"]
    result = runner.invoke(app, [str(src), str(dst), *flags])
    assert result.exit_code == 0, result.output
    assert "max_position_embeddings" in result.stdout and "256" in result.stdout
    assert "'<tool>'" in result.stdout and f"wrote {dst}" in result.stdout
    assert read_json(dst / "config.json")["rope_parameters"]["factor"] == 4.0
    assert "<tool>" in AutoTokenizer.from_pretrained(dst).get_vocab()


def test_progress_goes_to_stderr(src, tmp_path):
    result = runner.invoke(app, [str(src), str(tmp_path / "dst"), "--rope-type", "linear", "--factor", "2"])
    assert "bytes" not in result.stdout and "kB" in result.stderr


def test_dry_run_prints_report_and_writes_nothing(src, tmp_path):
    result = runner.invoke(app, [str(src), str(tmp_path / "dst"), "--rope-type", "yarn", "--factor", "4", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "rope_parameters.rope_type" in result.stdout and "wrote" not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_command_is_named_like_its_module():
    assert command.__name__ == "longattn.cli.extend"
