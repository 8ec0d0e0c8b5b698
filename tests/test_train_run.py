"""`longattn train`: one YAML from the plan to a checkpoint that loads; what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from checkpoints import digests, read_json, stored
from hf_models import tokens
from peft import AutoPeftModelForCausalLM
from stock_process import assert_same_model, run_without_longattn
from train_runs import LENGTH, RUN, STEPS, losses, spec, write_home
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from longattn.checkpoint import extend_checkpoint
from longattn.cli import app
from longattn.hf.attention import calls_seen
from longattn.pattern import parse_pattern
from longattn.plan import Plan
from longattn.surgery import restore
from longattn.train import TrainSpec, outputs, train

# weights that overflow at the last step, whose loss was formed before it
OVERFLOWS = dict(recipe="full", rank=8, steps=1, learning_rate=1e39, warmup=0)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:'pin_memory':UserWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def done(home):
    """A whole run by the command, and what it printed."""
    keys = {**RUN, "model": "src", "text": "text", "eval_text": "held.txt", "eval_every": 2, "out": "tuned"}
    (home / "train.yaml").write_text(yaml.safe_dump(keys))
    before = digests(home / "src")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        result = CliRunner().invoke(app, ["train", "train.yaml"])
    assert result.exit_code == 0, result.output
    assert digests(home / "src") == before
    return home / "tuned", result.stdout


def test_command_writes_a_checkpoint_log_and_plot(done):
    out, printed = done
    assert {path.name for path in out.iterdir()} == {
        *("train.yaml", "base", "checkpoints", "log.json", "loss.png", "model")
    }
    log = json.loads((out / "log.json").read_text())
    assert log["complete"] and list(losses(log)) == [1, 2, 3, 4] and list(losses(log, "eval_loss")) == [0, 2, 4]
    assert losses(log)[4] < losses(log)[1] and losses(log, "eval_loss")[4] < losses(log, "eval_loss")[0]
    assert all(entry["tokens_per_second"] > 0 for entry in log["history"] if entry["step"] > 1 and "loss" in entry)
    assert log["history"][-1]["tokens"] == STEPS * 2 * LENGTH
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG") and (out / "loss.png").stat().st_size > 10_000
    assert f"training loss  {losses(log)[1]:.4f} (step 1) -> {losses(log)[4]:.4f} (step 4)" in printed
    assert "wrote tuned/model" in printed


def test_log_is_documented_key_by_key(done):
    page = Path(__file__).parents[1] / "docs" / "commands.md"
    section = page.read_text(encoding="utf-8").partition("## `log.json`")[2].partition("\n## ")[0]
    log = json.loads((done[0] / "log.json").read_text())
    entries = {f"history[].{key}" for entry in log["history"] for key in entry}
    versions = {f"versions.{name}" for name in log["versions"]}
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    documented = {key for cell in cells for key in re.findall(r"`(.+?)`", cell)}
    assert documented == (log.keys() - {"versions"}) | versions | entries


def test_log_is_not_written_at_each_of_many_steps(monkeypatch, tmp_path, home):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock, written = Clock(), []
    monkeypatch.setattr(outputs, "time", clock)
    log = outputs.LogFile(tmp_path / "log.json", spec(home, tmp_path / "out"))
    monkeypatch.setattr(log, "write", lambda history: written.append(len(history)))
    for step in range(1, 41):
        clock.now += 1.0
        log.on_log(None, SimpleNamespace(log_history=[{"step": step}] * step), None)
    log.on_save(None, SimpleNamespace(log_history=[{}] * 40), None)
    assert written == [1, 11, 21, 31, 40]


def test_trained_checkpoint_is_a_longattn_checkpoint(done, home):
    out, _ = done
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "model"), AutoTokenizer.from_pretrained(out / "model")
    assert model.config.max_position_embeddings == 256 and model.config.use_cache
    assert tokenizer.convert_tokens_to_ids("<tool>") == 64 and model.get_input_embeddings().weight.shape[0] == 65
    for training, pattern in ((True, "group:32+shift:16"), (False, "full")):
        with calls_seen() as calls:
            model.train(training)(tokens(1, 64))
        assert {found for _, found in calls} == {parse_pattern(pattern)}
    assert (out / "model" / "LICENSE").read_text() == "Do as you like.\n"
    base, trained = stored(out / "base"), stored(out / "model")
    assert base.keys() == trained.keys()
    changed = {name for name in base if not torch.equal(base[name][1], trained[name][1])}
    assert changed == {name for name in base if "self_attn" in name or "norm" in name} | {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    old, new = base["lm_head.weight"][1], trained["lm_head.weight"][1]
    assert (old != new).any(1).nonzero().flatten().tolist() == [64]  # the new token's row alone
    restore(model)
    extend_checkpoint(out / "model", home / "again", Plan(rope={"factor": 2.0}))
    assert "### Plan 2" in (home / "again" / "README.md").read_text()


def test_trained_checkpoint_exports_to_stock_with_equal_logits(done, tmp_path):
    out, _ = done
    extend_checkpoint(out / "model", tmp_path / "stock", None, export="stock")
    run_without_longattn([tmp_path / "stock"], tmp_path)
    assert_same_model(out / "model", tmp_path / "stock")


def test_card_says_what_was_done(done):
    out, _ = done
    card = (out / "model" / "README.md").read_text()
    assert card.index("### Plan 1") < card.index("### Training 1") < card.index("# A model")
    assert "No weight was trained" not in card and "license: mit" in card
    assert "adapters of rank 2 on the attention's projections, the embeddings, the norms; it is folded" in card
    assert "Attention while it trained: 2 x group:32+shift; as it is served: 2 x full." in card
    assert "1,024 tokens in rows of 128" in card and str(out.parent) not in card
    assert "No weight was trained" in (out / "base" / "README.md").read_text()


def test_card_counts_the_tokens_that_were_read(home, tmp_path):
    result = train(spec(home, tmp_path / "out", accumulate=4, steps=3))  # 14 rows, 8 a step
    tokens = result.log["history"][-1]["tokens"]
    assert tokens < 3 * 8 * LENGTH and f"3 steps, {tokens:,} tokens" in (result.checkpoint / "README.md").read_text()
    assert result.log == json.loads((tmp_path / "out" / "log.json").read_text())


def test_a_run_killed_while_it_writes_the_checkpoint_goes_on(done, home, tmp_path):
    out, _ = done
    part = tmp_path / "part"
    shutil.copytree(out, part)
    shutil.rmtree(part / "model")
    run = replace(TrainSpec.from_yaml(out / "train.yaml"), resume=True)
    run = replace(run, model=str(home / "src"), text=str(home / "text"), eval_text=str(home / "held.txt"))
    run = replace(run, out=str(part))
    (part / "train.yaml").write_text(yaml.safe_dump(replace(run, resume=False).to_dict()))
    result = CliRunner().invoke(app, ["train", str(part / "train.yaml"), "--resume"])
    assert result.exit_code == 0, result.output
    expected = stored(out / "model")
    assert all(torch.equal(value, expected[name][1]) for name, (_, value) in stored(part / "model").items())
    with pytest.raises(FileExistsError, match="the run in .* is done, see .*model; name another out"):
        train(run)


def test_adapter_is_kept_beside_its_checkpoint(home, tmp_path):
    kept = train(spec(home, tmp_path / "kept", adapter="keep", steps=2)).checkpoint
    merged = train(spec(home, tmp_path / "merged", steps=2)).checkpoint
    assert kept.name == "adapter" and not (tmp_path / "kept" / "model").exists()
    model = AutoPeftModelForCausalLM.from_pretrained(kept).eval()
    ids = tokens(1, 100)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(kept).convert_tokens_to_ids("<tool>") == 64
    card = (kept / "README.md").read_text()
    assert "it lies here, beside the checkpoint" in card and "AutoPeftModelForCausalLM.from_pretrained" in card


def test_adapter_of_a_model_on_the_hub_names_it(home, tmp_path, monkeypatch):
    monkeypatch.setattr("longattn.train.run.source_folder", lambda src: home / "src")  # what the Hub would have given
    keys = dict(model="us/ours", text=str(home / "text"), out=str(tmp_path / "out"), length=64, steps=1, adapter="keep")
    folder = train(TrainSpec.from_dict(keys)).checkpoint
    assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == "us/ours"
    card = (folder / "README.md").read_text()
    assert "base_model: us/ours" in card and "[us/ours](https://huggingface.co/us/ours)" in card


def test_bfloat16_and_checkpointing_train_the_same_weights_in_float32(home, tmp_path):
    plain = train(spec(home, tmp_path / "plain", steps=2))
    again = train(spec(home, tmp_path / "again", steps=2, gradient_checkpointing=True))
    half = train(spec(home, tmp_path / "half", steps=2, bf16=True))
    assert losses(again.log) == pytest.approx(losses(plain.log), rel=1e-4)
    assert losses(half.log) == pytest.approx(losses(plain.log), rel=2e-2)
    weights = [stored(run.checkpoint) for run in (plain, half)]
    assert all(value.dtype == torch.float32 for found in weights for _, value in found.values())
    base = stored(tmp_path / "half" / "base")
    assert all(torch.equal(value, base[name][1]) for name, (_, value) in weights[1].items() if "mlp" in name)


def test_checkpoint_without_a_plan_trains_its_own_tokens(home, done, tmp_path):
    out, _ = done
    keys = dict(model=str(out / "model"), text=str(home / "text"), out=str(tmp_path / "more"), length=64, steps=1)
    result = train(TrainSpec.from_dict({**keys, "recipe": "new-rows", "new_tokens": ["<tool>"], "warmup": 0}))
    assert not (tmp_path / "more" / "base").exists()
    card = (result.checkpoint / "README.md").read_text()
    assert "### Training 1" in card and "### Training 2" in card and "only the embeddings' rows of 1 token;" in card
    with pytest.raises(ValueError, match="new_tokens must be in the model's tokenizer, got '<none>'"):
        train(TrainSpec.from_dict({**keys, "out": str(tmp_path / "none"), "new_tokens": ["<none>"]}))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(length=4096), "length must be at most the model's 256 positions, got 4096; let rope or context extend"),
        (dict(text="absent.txt"), "No such file"),
        (dict(field="body", text="rows.jsonl"), "must have text in the field 'body', got fields text"),
        (dict(rope={"rope_type": "yarn"}), "factor"),
        (dict(learning_rate=1e30, warmup=0, save_every=9), "the loss must stay finite, got nan at step 3; lower"),
        (dict(learning_rate=1e30, warmup=0, save_every=3, log_every=9), "the loss must stay finite, got nan at step 3"),
        (dict(learning_rate=1e30, warmup=0, save_every=9, log_every=9), "the loss must stay finite, got nan at step 4"),
        (OVERFLOWS, "the weights must stay finite, got nan in model.embed_tokens.weight at step 1; lower"),
        (dict(OVERFLOWS, recipe="longlora", adapter="keep"), "the weights must stay finite, got nan in"),
        (dict(OVERFLOWS, recipe="new-rows"), "the weights must stay finite, got inf in"),
        (dict(model="nowhere/else/at/all"), "neither a folder nor the id of a model"),
    ],
)
def test_a_run_that_fails_leaves_nothing(home, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "w1"}\n')
    keys = {**RUN, "model": str(home / "src"), "text": str(home / "text"), "out": "out", **change}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(keys))
    result = CliRunner().invoke(app, ["train", "train.yaml"])
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("longattn train: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("link", [False, True])
def test_an_empty_folder_that_was_there_stays_when_a_run_fails(home, tmp_path, link):
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o750)
    out = tmp_path / "out" if link else mine
    if link:
        out.symlink_to(mine)
    with pytest.raises(ValueError, match="length must be at most the model's 256 positions"):
        train(spec(home, out, length=4096))
    assert list(out.iterdir()) == [] and mine.stat().st_mode & 0o777 == 0o750


def test_folders_of_other_things_and_other_runs_are_refused(done, home, tmp_path):
    out, _ = done
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(ValueError, match="out must be new, empty or the folder of an earlier run"):
        train(spec(home, tmp_path / "mine"))
    with pytest.raises(ValueError, match="out must be a folder, got the file"):
        train(spec(home, tmp_path / "mine" / "file"))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "train.yaml").write_text(yaml.safe_dump(spec(home, begun).to_dict()))
    with pytest.raises(ValueError, match="learning_rate must be that of the run in .*, 0.01, to go on .* got 1.0"):
        train(spec(home, begun, learning_rate=1.0, resume=True))
