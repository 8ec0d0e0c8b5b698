"""What no stock checkpoint can say is refused with the reason, the source is untouched, and nothing is left behind."""

import pytest
from checkpoints import digests, edit_json, read_json, write_checkpoint
from typer.testing import CliRunner

import longattn
from longattn.checkpoint import extend_checkpoint, preview_checkpoint
from longattn.cli.commands import app
from longattn.legacy_keys import legacy_config_keys, legacy_tokenizer_config

runner = CliRunner()


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("llama") / "src")


@pytest.fixture(autouse=True)
def src_is_untouched(src):
    before = digests(src)
    yield
    assert digests(src) == before


REFUSED = [
    ("3 x full, window:8+sinks:4", "layer 3 attends by window:8\\+sinks:4, but stock transformers has no sink tokens"),
    ("group:8", "layer 0 attends by group:8, but stock transformers has no groups"),
    ("full, group:8+shift", "layer 1 attends by group:8\\+shift, but stock transformers has no groups"),
    ("window:8, window:16", "one sliding_window for all its windows, got windows of \\[8, 16\\] tokens"),
    ("window:1", "at least 2 tokens"),
]


@pytest.mark.parametrize(("attention", "message"), REFUSED)
def test_what_stock_configs_can_not_say_is_refused(src, tmp_path, attention, message):
    plan = longattn.Plan(attention=attention)
    with pytest.raises(ValueError, match=message):
        preview_checkpoint(src, plan, export="stock")
    with pytest.raises(ValueError, match=message):
        extend_checkpoint(src, tmp_path / "dst", plan, export="stock")
    assert list(tmp_path.iterdir()) == []


def test_extended_checkpoint_that_no_stock_config_can_say_is_refused(src, tmp_path):
    extend_checkpoint(src, tmp_path / "dst", longattn.Plan(attention="window:8+sinks:4"))
    with pytest.raises(ValueError, match="no sink tokens; export a plan of full layers and windows of one size, or"):
        extend_checkpoint(tmp_path / "dst", tmp_path / "stock", None, export="stock")


def test_biases_of_attention_alone_find_their_architecture(tmp_path):
    biased = write_checkpoint(tmp_path / "src", attention_bias=True)
    report = preview_checkpoint(biased, longattn.Plan(attention="window:8"), export="stock")
    assert ("llama", "smollm3") in [(change.before, change.after) for change in report.changes]


def test_other_exports_and_no_plan_are_refused(src, tmp_path):
    with pytest.raises(ValueError, match="export must be 'stock' or None, got 'gguf'"):
        extend_checkpoint(src, tmp_path / "dst", longattn.Plan(attention="window:8"), export="gguf")
    with pytest.raises(TypeError, match="plan must be a longattn.Plan, got NoneType"):
        extend_checkpoint(src, tmp_path / "dst", None)


def test_quantised_checkpoint_and_existing_folder_are_refused(src, tmp_path):
    with pytest.raises(FileExistsError):
        extend_checkpoint(src, tmp_path, None, export="stock")
    quantised = write_checkpoint(tmp_path / "src")
    edit_json(quantised / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(ValueError, match="quantised"):
        extend_checkpoint(quantised, tmp_path / "dst", None, export="stock")


def test_code_of_its_own_is_left_behind_with_the_architecture(src, tmp_path):
    own = write_checkpoint(tmp_path / "src")
    edit_json(own / "config.json", auto_map={"AutoModelForCausalLM": "modeling_extra.Other"})
    report = extend_checkpoint(own, tmp_path / "dst", longattn.Plan(attention="window:8"), export="stock")
    assert "auto_map" in [change.what for change in report.changes]
    assert "auto_map" not in read_json(tmp_path / "dst" / "config.json")


def test_command_converts_and_shows_what_it_would_write(src, tmp_path):
    flags = ["--attention", "window:8, full", "--export", "stock"]
    shown = runner.invoke(app, ["extend", str(src), *flags, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "MinistralForCausalLM" in shown.stdout and "keys of transformers 5 those of version 4" in shown.stdout
    assert list(tmp_path.iterdir()) == []
    written = runner.invoke(app, ["extend", str(src), str(tmp_path / "dst"), *flags])
    assert written.exit_code == 0, written.output
    assert read_json(tmp_path / "dst" / "config.json")["model_type"] == "ministral"
    again = runner.invoke(app, ["extend", str(src), str(tmp_path / "same"), "--export", "stock"])
    assert again.exit_code == 0, again.output
    assert read_json(tmp_path / "same" / "config.json")["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--export", "gguf"], "--export must be stock, got 'gguf'"), (["--export", "stock"], "DST is missing")],
)
def test_command_refuses_in_one_line(src, flags, message):
    result = runner.invoke(app, ["extend", str(src), *flags])
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1


FULL = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("model_type", "rope", "keys"),
    [
        ("llama", LOCAL, {"rope_theta": 1e4}),
        ("phi", {**LOCAL, "partial_rotary_factor": 0.5}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("gpt_neox", {**LOCAL, "partial_rotary_factor": 0.25}, {"rotary_emb_base": 1e4, "rotary_pct": 0.25}),
        ("olmo2", FULL, {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 8.0}}),
        (
            "gemma3_text",
            {"full_attention": FULL, "sliding_attention": LOCAL},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
    ],
)
def test_families_have_their_own_keys_in_version_4(model_type, rope, keys):
    assert legacy_config_keys({"model_type": model_type, "rope_parameters": rope}) == (keys, [])


@pytest.mark.parametrize(
    ("model_type", "rope", "message"),
    [
        ("gemma3_text", {"full_attention": FULL, "sliding_attention": FULL}, "ropes that differ"),
        ("olmo3", {"full_attention": LOCAL, "sliding_attention": {**LOCAL, "rope_theta": 1e5}}, "ropes that differ"),
        ("llama", {**LOCAL, "rope_type": "proportional"}, "no rope_type 'proportional'"),
        ("olmo", {**FULL, "rope_type": "yarn", "original_max_position_embeddings": 64}, "reads only linear, dynamic"),
    ],
)
def test_what_version_4_can_not_read_is_said(model_type, rope, message):
    assert message in legacy_config_keys({"model_type": model_type, "rope_parameters": rope})[1][0]


def test_experts_and_windows_of_qwen_have_their_keys_and_notes():
    fields = {"rope_parameters": LOCAL, "dtype": "bfloat16"}
    keys, unreadable = legacy_config_keys({**fields, "model_type": "qwen3_moe", "num_local_experts": 4})
    assert (keys, unreadable) == ({"torch_dtype": "bfloat16", "num_experts": 4, "rope_theta": 1e4}, [])
    mixed = {**fields, "model_type": "qwen2_moe", "layer_types": ["full_attention", "sliding_attention"]}
    assert "reads no layer_types" in legacy_config_keys(mixed)[1][0]


def test_tokenizer_of_version_4_stays():
    fields = {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<image>"}}
    assert legacy_tokenizer_config(fields) == fields
