"""`longattn inspect`: structure by layer and costs, of stock checkpoints, planned ones and extended ones."""

import json
import math

import pytest
import typer
from checkpoints import digests, write_checkpoint
from transformers import Gemma3Config, MambaConfig
from typer.testing import CliRunner

import longattn
from longattn.checkpoint import extend_checkpoint
from longattn.cli.inspect import inspect
from longattn.structure import inspect_checkpoint, structure_of

runner = CliRunner()
app = typer.Typer()
app.command()(inspect)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("checkpoints")
    return {family: write_checkpoint(top / family, family) for family in ("llama", "mistral", "qwen2")}


def run_json(*arguments):
    result = runner.invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_layers_show_own_windows(folders):
    expected = {"llama": ["full"] * 4, "mistral": ["window:8"] * 4, "qwen2": ["full", "full", "window:8", "window:8"]}
    for family, patterns in expected.items():
        output = run_json(folders[family], "--context", 40)
        assert output["after"] is None
        assert [layer["attention"] for layer in output["before"]["layers"]] == patterns
        cached = [40 if pattern == "full" else 7 for pattern in patterns]
        assert [layer["cached_tokens"] for layer in output["before"]["layers"]] == cached
        assert output["before"]["costs"]["stock_mask_bytes"] == (0 if family == "llama" else 1600)


def test_costs_follow_from_sizes(folders):
    costs = run_json(folders["llama"], "--context", 100)["before"]["costs"]
    assert costs["kv_cache_bytes"] == 4 * 2 * 100 * 2 * 8 * 2  # layers, k and v, tokens, kv heads, channels, bfloat16
    assert costs["prefill_flops"] == 4 * 4 * 100 * 101 / 2 * 4 * 8  # layers, operations, pairs, heads, channels
    assert costs["decode_flops"] == 4 * 4 * 100 * 4 * 8


def test_wavelengths_are_those_of_the_rope(folders):
    layer = run_json(folders["llama"], "--rope-type", "linear", "--factor", 4)["after"]["layers"][0]
    assert layer["rope_type"] == "linear"
    expected = [2 * math.pi * 4, 2 * math.pi * 4 * 10000 ** (6 / 8)]
    assert layer["wavelengths"] == pytest.approx(expected)


def test_plan_is_compared_with_what_is(folders):
    output = run_json(folders["mistral"], "--context", 64, "--attention", "window:16+sinks:2, full")
    before, after = output["before"], output["after"]
    assert [layer["attention"] for layer in before["layers"]] == ["window:8"] * 4
    assert [layer["attention"] for layer in after["layers"]] == ["window:16+sinks:2", "full"] * 2
    assert after["costs"]["stock_mask_bytes"] == 0
    assert after["costs"]["prefill_flops"] > before["costs"]["prefill_flops"]
    assert (before["max_position_embeddings"], after["max_position_embeddings"]) == (64, 64)


def test_context_gives_the_factor_of_a_rope_type(folders):
    output = run_json(folders["llama"], "--context", 512, "--rope-type", "yarn")
    assert output["before"]["context"] == output["after"]["context"] == 512
    assert output["after"]["max_position_embeddings"] == 512


def test_costs_are_at_the_longest_length_by_default(folders):
    output = run_json(folders["llama"], "--rope-type", "yarn", "--factor", 8)
    assert output["before"]["context"] == output["after"]["context"] == 512


def test_extended_checkpoint_is_compared_with_its_original(folders, tmp_path):
    plan = longattn.Plan(
        rope={"rope_type": "yarn", "factor": 4.0},
        attention="window:8, full",
        train_attention="group:8+shift",
        tokens={"tokens": ["<tool>"]},
    )
    extend_checkpoint(folders["qwen2"], tmp_path / "dst", plan)
    planned = inspect_checkpoint(folders["qwen2"], context=200, plan=plan)
    carried_out = inspect_checkpoint(tmp_path / "dst", context=200)
    assert carried_out == planned
    assert [layer.train_attention for layer in carried_out[1].layers] == ["group:8+shift"] * 4
    assert [layer.attention for layer in carried_out[0].layers] == ["full", "full", "window:8", "window:8"]


def test_weights_and_tokenizer_are_not_needed(folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    before = digests(tmp_path)
    assert run_json(tmp_path, "--context", 40) == run_json(folders["llama"], "--context", 40)
    assert digests(tmp_path) == before


def test_tables_join_equal_layers(folders):
    result = runner.invoke(app, [str(folders["qwen2"]), "--context", "4096", "--attention", "3 x window:16, full"])
    assert result.exit_code == 0, result.output
    for text in (
        "layers before: qwen2",
        "0-1",
        "2-3",
        "layers after",
        "0-2",
        "window:16",
        "4 of 8, 2 kv",
        "after / before",
    ):
        assert text in result.stdout
    assert "16 MiB" in result.stdout  # the stock mask, 4096 x 4096 bytes


def test_ranks_share_a_text(folders):
    flags = ["--context", 4096, "--attention", "window:17, full", "--train-attention", "window:33"]
    output = run_json(folders["llama"], *flags, "--ranks", 4, "--link", "8Gb/s", "--flops", "1T")["ranks"]
    key_and_value = 2 * 2 * 8 * 2  # of 2 heads of 8 channels in bfloat16
    assert (output["link"], output["flops"], output["full"]) == (1e9, 1e12, "gather")
    after = output["after"]
    assert after["tokens"] == 1024 and output["before"]["remote_bytes"] == 4 * 3 * 1024 * key_and_value
    assert after["forward"]["sent_bytes"] == (2 * 16 + 2 * 3 * 1024) * key_and_value  # the first rank's, to all
    assert after["training"]["sent_bytes"] == 4 * 2 * 32 * key_and_value  # an inner rank's, forth and back
    assert after["checkpointed"]["sent_bytes_of_all"] == 4 * 3 * 3 * 32 * key_and_value
    assert after["training"]["communication_s"] == pytest.approx(4 * 2 * 32 * key_and_value / 1e9)
    result = runner.invoke(app, [str(folders["llama"]), *map(str, flags), "--ranks", "4"])
    assert "over 4 ranks, 1,024 each" in result.stdout and "training step: sent" in result.stdout


REFUSED = [
    (["SRC", "--ranks", "0"], "ranks must be 1 to 4096, got 0"),
    (["SRC", "--ranks", "2", "--link", "fast"], "bytes or bits a second such as 45GB/s or 400Gb/s, got 'fast'"),
    (["SRC", "--ranks", "2", "--flops", "0T"], "operations a second such as 400T, got '0T'"),
    (["SRC", "--ranks", "2", "--full", "ring"], "full must be gather or ulysses, got 'ring'"),
    (["SRC", "--ranks", "4", "--full", "ulysses"], "needs heads that 4 ranks can share, got 4 and 2 kv"),
    (["SRC", "--context", "0"], "context must be at least 1 token, got 0"),
    (["SRC", "--rope-type", "yarn"], "needs a factor, or context"),
    (["SRC", "--attention", "windw:4"], "got 'windw:4'"),
    (["EMPTY"], "has no config.json"),
    (["TOKENS"], "changes no structure, only tokens"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_errors_are_one_line_and_exit_code_2(folders, tmp_path, arguments, message):
    (tmp_path / "tokens.yaml").write_text('tokens: {tokens: ["<a>"]}')
    source = str(tmp_path) if arguments == ["EMPTY"] else str(folders["llama"])
    flags = ["--plan", str(tmp_path / "tokens.yaml")] if arguments == ["TOKENS"] else arguments[1:]
    result = runner.invoke(app, [source, *flags])
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("longattn inspect: ") and message in lines[0]


@pytest.mark.parametrize("config", [MambaConfig(), Gemma3Config()], ids=["mamba", "gemma3"])
@pytest.mark.parametrize("flags", [[], ["--context", "64"], ["--ranks", "2"], ["--attention", "window:4"]])
def test_families_that_are_not_served_are_refused_in_one_line(tmp_path, config, flags):
    config.save_pretrained(tmp_path)
    result = runner.invoke(app, [str(tmp_path), *flags])
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"longattn inspect: model_type '{config.model_type}' is not served: ")
    for function in (lambda: inspect_checkpoint(tmp_path), lambda: structure_of(config, 64)):
        with pytest.raises(ValueError, match=f"^inspect: model_type '{config.model_type}' is not served"):
            function()


def test_lines_name_the_command_alone(folders):
    result = runner.invoke(app, [str(folders["llama"]), "--attention", "group:4096"])
    assert result.stderr.startswith("longattn inspect: a group must fit into the model's")
