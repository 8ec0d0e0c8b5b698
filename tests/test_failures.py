"""What a person can get wrong, a row each: one line that names it, SRC byte-identical, no DST and no traces of one."""

import re
import shutil

import pytest
from checkpoints import digests
from damaged_configs import CONFIGS
from damaged_weights import WEIGHTS
from typer.testing import CliRunner

from longattn.checkpoint import extend_checkpoint
from longattn.cli import app
from longattn.plan import Plan

pytestmark = pytest.mark.usefixtures("src_is_untouched")

YARN = ["--rope-type", "yarn", "--factor", "4"]
TOKEN = ["--add-token", "<tool>"]


def assert_refused(src, folder, arguments, message):
    """Run `longattn extend SRC folder/dst ...` and hold it to what every refusal promises."""
    before, beside = digests(src), sorted(folder.iterdir())
    result = CliRunner().invoke(app, ["extend", str(src), *arguments])
    assert result.exit_code == 2, result.output or repr(result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("longattn extend: "), line
    assert re.search(message, line), line
    assert digests(src) == before
    assert sorted(folder.iterdir()) == beside


PLANS = [
    ("dst", [], "say what to change"),
    ("", YARN, "DST is missing"),
    (".", YARN, "DST .* exists; give the name of a new folder"),
    ("dst", ["--rope-type", "yran", "--factor", "2"], "did you mean 'yarn'"),
    ("dst", ["--rope-type", "yarn"], "needs a factor, or context"),
    ("dst", ["--rope", "factor"], "--rope must be KEY=VALUE, got 'factor'"),
    ("dst", ["--factor", "2", "--rope", "factor=2"], "gives factor twice"),
    ("dst", ["--rope", "factor=2", "--rope", "factor.beta_fast=2"], "gives factor both a value and factor.beta_fast"),
    ("dst", ["--rope", "factor=[1"], "--rope factor"),
    ("dst", ["--plan", "none.yaml", "--factor", "2"], "not both; got --plan and rope"),
    ("dst", ["--plan", "none.yaml"], "none.yaml"),
    ("dst", ["--rope-type", "linear", "--factor", "nan"], "'factor'.* must be a finite number of at least 1, got nan"),
    ("dst", ["--rope-type", "linear", "--factor", "inf"], "'factor'.* must be a finite number of at least 1, got inf"),
    ("dst", ["--rope-type", "linear", "--factor", "-2"], "'factor'.* must be a finite number of at least 1, got -2"),
    ("dst", ["--rope-type", "linear", "--factor", "0.5"], "'factor'.* must be a finite number of at least 1, got 0.5"),
    ("dst", ["--rope-type", "linear", "--factor", "1"], "changes no rotary frequency"),
    ("dst", ["--rope-type", "linear", "--factor", "1e300"], "at most 10\\^15"),
    ("dst", ["--rope", "factr=2"], "unknown key 'factr'; did you mean 'factor'"),
    ("dst", ["--rope-type", "linear", "--factor", "2", "--rope", "beta_fast=32"], "'linear' has no key 'beta_fast'"),
    ("dst", [*YARN, "--rope", "type=linear"], "rope_type 'yarn' and type 'linear', which differ"),
    ("dst", [*YARN, "--rope", "beta_fast=1", "--rope", "beta_slow=32"], "'beta_fast'.* must be above beta_slow 32"),
    ("dst", [*YARN, "--context", "512"], "factor 4 times 64 tokens is 256, but context is 512; give one of the two"),
    ("dst", ["--rope-type", "yarn", "--context", "32"], "context must be at least the present 64 tokens, got 32"),
    ("dst", ["--rope", "full_attention.factor=4"], "names the layer types .* has one rope for all layers"),
    ("dst", ["--attention", "window:0"], "must hold at least 1 token, got 0"),
    ("dst", ["--attention", "window:-4"], "expected a whole number >= 0, got '-4'"),
    ("dst", ["--attention", "windo:8"], "pattern must be full, window:W, .* got 'windo:8'; did you mean 'window'"),
    ("dst", ["--attention", "group:65"], "a group must fit into the model's 64 tokens, got group:65"),
    ("dst", ["--attention", "group:8+shift:8"], "shift must be below the group's 8 tokens, got 8"),
    ("dst", ["--attention", "[full, full]"], "one pattern a layer, 4 in all, got 2"),
    ("dst", ["--attention", "full"], "the plan changes nothing: the layers attend by 4 x full already"),
    ("dst", ["--plain"], "need --add-token"),
    ("dst", ["--add-token", "w3"], "tokens must be new, got 'w3'"),
    ("dst", [*TOKEN, "--token-init", "mean", "--token-init", "mean"], "must be TOKEN=DESCRIPTION"),
    ("dst", ["--add-token", "pad_token=<a>", "--add-token", "pad_token=<b>"], "gives a role twice"),
]


@pytest.mark.parametrize(("dst", "arguments", "message"), PLANS)
def test_wrong_flags_are_refused(src, tmp_path, dst, arguments, message):
    folders = [str(tmp_path / dst)] if dst else []
    assert_refused(src, tmp_path, [*folders, *arguments], message)


PLAN_FILES = [
    ("atention: full", "unknown key 'atention'; did you mean 'attention'"),
    ("rope: {rope_type: yarn, factr: 8}", "unknown key 'factr'; did you mean 'factor'"),
    ("rope: {rope_type: yran, factor: 8}", "did you mean 'yarn'"),
    ("tokens: {token: [<a>]}", "unknown key 'token'; did you mean 'tokens'"),
    ("tokens: {tokens: [3]}", "must hold texts .* got 3"),
    ("tokens: {tokens: [<a>], init: 3}", r"tokens\['init'\] must be a text.* got 3"),
    ("context: 128\ncontext: 256", "the key 'context' comes twice"),
    ("rope: {factor: 8", r"plan\.yaml, line \d+"),
    ("rope: &a [*a]", r"plan\.yaml, line 1: aliases are not read, write out what \*a stands for"),
    ("a: &a [x]\nb: &b [*a, *a]\nrope: [*b, *b]", "aliases are not read"),
    ("rope: !!python/object/apply:os.mkdir [owned]", "could not determine a constructor"),
    ("context: !!bool maybe", "plan.yaml is not YAML text"),
    ("context: !!timestamp never", "plan.yaml is not YAML text"),
    ("rope: " + "[" * 5000, "is nested too deeply"),
    ("", "a plan must be a mapping"),
]


@pytest.mark.parametrize(("text", "message"), PLAN_FILES, ids=[message for _, message in PLAN_FILES])
def test_wrong_plan_files_are_refused(src, tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    assert_refused(src, tmp_path, [str(tmp_path / "dst"), "--plan", str(tmp_path / "plan.yaml")], message)


@pytest.mark.parametrize(("damage", "message"), [*WEIGHTS, *CONFIGS])
def test_damaged_source_is_refused(src, tmp_path, damage, message):
    bad = tmp_path / "bad"
    shutil.copytree(src, bad)
    arguments = damage(bad) or YARN
    assert_refused(bad, tmp_path, [str(tmp_path / "dst"), *arguments], message)
    assert not list(tmp_path.rglob("owned"))


@pytest.mark.parametrize("name", ["nothing/here", "./nothing", "file", "empty", "adapter"])
def test_source_that_is_no_checkpoint_is_refused(src, tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    message = {
        "nothing/here": "SRC nothing/here is no folder here, and as a Hub id it can't be fetched",
        "./nothing": "SRC ./nothing is neither a folder nor the id of a model",
        "file": "must be a checkpoint's folder or a Hub id, got the file file",
        "empty": "SRC empty has no config.json, so it is no transformers checkpoint",
        "adapter": "SRC adapter has no config.json, so it is a PEFT adapter; merge it",
    }[name]
    result = CliRunner().invoke(app, ["extend", name, "dst", *YARN])
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "dst").exists()


def test_rope_plan_needs_no_tokenizer(src, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(src, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    extend_checkpoint(bare, tmp_path / "dst", Plan(rope={"rope_type": "yarn", "factor": 4.0}))
    assert (tmp_path / "dst" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rope-type", "linear", "--factor", "2"], "the checkpoint is scaled already, .*'yarn'"),
        (["--rope-type", "yarn", "--factor", "1"], "changes no rotary frequency"),
        (["--context", "128"], "context must be at least the present 256 tokens, got 128"),
    ],
)
def test_second_plan_that_contradicts_the_first_is_refused(src, tmp_path, arguments, message):
    once = tmp_path / "once"
    extend_checkpoint(src, once, Plan(rope={"rope_type": "yarn", "factor": 4.0}))
    assert_refused(once, tmp_path, [str(tmp_path / "twice"), *arguments], message)
