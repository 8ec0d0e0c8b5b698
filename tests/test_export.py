"""Stock exports: a process without longattn makes of them the logits and texts that longattn's checkpoints give."""

import json

import pytest
import torch
from checkpoints import digests, read_json, same_bits, stored, write_checkpoint
from stock_process import assert_same_model, run_without_longattn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer

import longattn
from longattn.checkpoint import extend_checkpoint, preview_checkpoint
from longattn.rope import rope_frequencies

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 3.0, 4.0]}
LONG = {**LONGROPE, "original_max_position_embeddings": 32}
TOKENS = {"tokens": [f"<t{i}>" for i in range(9)]}  # 60 tokens in 64 rows: the matrices grow
BIASED = dict(attention_bias=True, mlp_bias=True)
MIXED = "2 x window:8, 1 x full"
# name: family, its fields, the plan, and the architecture that says it
CASES = {
    "rope": ("llama", {}, dict(rope=YARN), "llama"),
    "rope and tokens": ("llama", {"tie_word_embeddings": True}, dict(rope=LLAMA3, tokens=TOKENS), "llama"),
    "dynamic": ("llama", {}, dict(rope={"rope_type": "dynamic", "factor": 2.0}), "llama"),
    "windows": ("llama", {}, dict(rope=YARN, attention="window:8", tokens=TOKENS), "mistral"),
    "linear": (
        "llama",
        {"head_dim": 16},
        dict(rope={"rope_type": "linear", "factor": 2}, attention="window:5"),
        "mistral",
    ),
    "tied": ("llama", {"tie_word_embeddings": True}, dict(rope=LLAMA3, attention=MIXED, tokens=TOKENS), "ministral"),
    "longrope": ("llama", {}, dict(rope=LONG, attention="window:16"), "mistral"),
    "by-parts": ("llama", {}, dict(rope={"rope_type": "by-parts", "factor": 4.0}, attention=MIXED), "ministral"),
    "biases": ("llama", BIASED, dict(rope=YARN, attention=MIXED), "smollm3"),
    "biased windows": ("llama", BIASED, dict(attention="window:8"), "smollm3"),
    "trained in groups": ("llama", {}, dict(rope=YARN, train_attention="group:8+shift"), "llama"),
    "two tokens": ("llama", {}, dict(attention="window:2"), "mistral"),
    "mistral's own": ("mistral", {}, dict(rope=YARN), "mistral"),
    "mistral full": ("mistral", {}, dict(attention="full"), "mistral"),
    "mistral narrower": ("mistral", {}, dict(rope=LLAMA3, attention="window:4"), "mistral"),
    "mistral mixed": ("mistral", {"tie_word_embeddings": True}, dict(attention=MIXED, tokens=TOKENS), "ministral"),
    "qwen2's own": ("qwen2", {}, dict(rope=YARN, tokens=TOKENS), "qwen2"),
    "qwen2 full": ("qwen2", {}, dict(attention="full"), "qwen2"),
    "qwen2 mixed": ("qwen2", {}, dict(rope=YARN, attention="window:6, full"), "qwen2"),
    "qwen2 windows": ("qwen2", {"use_sliding_window": False}, dict(attention="window:6"), "qwen2"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The source, checkpoint and export of every case, and what a process without longattn makes of the last."""
    made = {}
    for name, (family, fields, plan, _) in CASES.items():
        folder = tmp_path_factory.mktemp("case")
        src = write_checkpoint(folder / "src", family, **fields)
        before = digests(src)
        extend_checkpoint(src, folder / "longattn", longattn.Plan(**plan))
        extend_checkpoint(src, folder / "stock", longattn.Plan(**plan), export="stock")
        assert digests(src) == before
        made[name] = folder
    complaints = run_without_longattn([folder / "stock" for folder in made.values()], tmp_path_factory.mktemp("ids"))
    assert complaints == ""
    return made


@pytest.mark.parametrize("name", CASES)
def test_logits_and_texts_equal_those_with_longattn(folders, name):
    assert_same_model(folders[name] / "longattn", folders[name] / "stock")


@pytest.mark.parametrize("name", CASES)
def test_config_has_nothing_of_longattn_and_the_right_architecture(folders, name):
    fields = read_json(folders[name] / "stock" / "config.json")
    assert fields["model_type"] == CASES[name][3]
    assert [text for text in ("longattn", "attn_implementation", "auto_map") if text in json.dumps(fields)] == []
    config = AutoConfig.from_pretrained(folders[name] / "stock")
    assert fields["architectures"] == [type(AutoModelForCausalLM.from_config(config)).__name__]


@pytest.mark.parametrize("name", CASES)
def test_tensors_keep_names_and_bytes(folders, name):
    folder = folders[name]
    with_longattn, stock = stored(folder / "longattn"), stored(folder / "stock")
    assert list(stock) == list(with_longattn)
    assert all(same_bits(stock[key][1], with_longattn[key][1]) for key in stock)


@pytest.mark.parametrize("name", CASES)
def test_rope_parameters_read_back_equal(folders, name):
    folder = folders[name]
    with_longattn, stock = (AutoConfig.from_pretrained(folder / which) for which in ("longattn", "stock"))
    assert stock.rope_parameters == with_longattn.rope_parameters
    assert stock.max_position_embeddings == with_longattn.max_position_embeddings
    assert stock.dtype == with_longattn.dtype == torch.bfloat16


@pytest.mark.parametrize("name", CASES)
def test_keys_of_version_4_give_the_same_frequencies(folders, name):
    fields = read_json(folders[name] / "stock" / "config.json")
    assert fields["torch_dtype"] == "bfloat16"
    scaling = dict(fields.get("rope_scaling") or {"rope_type": "default"})
    if scaling["rope_type"] == "longrope":  # whose length version 4 looks for in the config alone
        scaling["original_max_position_embeddings"] = fields["original_max_position_embeddings"]
        scaling["factor"] = fields["max_position_embeddings"] / fields["original_max_position_embeddings"]
    assert set(scaling) & {"rope_theta", "partial_rotary_factor"} == set()  # version 4 warns of them there
    old = {"rope_theta": fields["rope_theta"], "rope_scaling": scaling}
    head_dim = fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    for seq_len in (None, 10 * fields["max_position_embeddings"]):
        lengths = dict(max_position_embeddings=fields["max_position_embeddings"], seq_len=seq_len)
        expected = rope_frequencies(fields["rope_parameters"], head_dim, **lengths)
        found = rope_frequencies(old, head_dim, **lengths)
        assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


@pytest.mark.parametrize("name", CASES)
def test_tokenizer_reads_as_before_and_in_names_of_version_4(folders, name):
    folder = folders[name]
    fields = read_json(folder / "stock" / "tokenizer_config.json")
    assert fields["tokenizer_class"] in (
        "PreTrainedTokenizerFast",
        "Qwen2Tokenizer",
    )  # version 4 has no TokenizersBackend
    assert not isinstance(fields.get("extra_special_tokens"), list)
    before, after = (AutoTokenizer.from_pretrained(folder / which) for which in ("longattn", "stock"))
    assert after.get_vocab() == before.get_vocab()
    assert after.all_special_tokens == before.all_special_tokens
    assert after("w3 <t1> w4")["input_ids"] == before("w3 <t1> w4")["input_ids"]
    assert after.chat_template == before.chat_template and after.model_max_length == before.model_max_length


@pytest.mark.parametrize("name", ["rope", "windows", "tied", "trained in groups", "mistral mixed", "qwen2 mixed"])
def test_checkpoint_that_was_extended_is_converted(folders, tmp_path, name):
    folder = folders[name]
    before = digests(folder / "longattn")
    report = extend_checkpoint(folder / "longattn", tmp_path / "dst", None, export="stock")
    assert digests(folder / "longattn") == before
    found, expected = digests(tmp_path / "dst"), digests(folder / "stock")
    found.pop("README.md"), expected.pop("README.md")
    assert found == expected
    assert report.tokens is None
    assert not {"rope_parameters", "attention", "max_position_embeddings"} & {change.what for change in report.changes}


def test_report_says_what_is_written_and_left_out(folders):
    src = folders["windows"] / "src"
    plan = longattn.Plan(attention="window:8", train_attention="group:8+shift")
    report = preview_checkpoint(src, plan, export="stock")
    changes = {change.what: (change.before, change.after) for change in report.changes}
    assert changes == {
        "attention": (["full"] * 4, ["window:8"] * 4),
        "model_type": ("llama", "mistral"),
        "architectures": (["LlamaForCausalLM"], ["MistralForCausalLM"]),
        "sliding_window": (None, 8),
    }
    assert "train_attention, 4 x group:8+shift, is left out" in str(report)
    trained = preview_checkpoint(src, longattn.Plan(train_attention="group:8+shift"), export="stock")
    assert str(trained).startswith("no field of the config changes\n")
    assert "rope_theta, torch_dtype" in str(report)
    assert report.proofs == ["config.json reads back as mistral: 4 x window:8, the same rope, 39 parameters"]


def test_exported_checkpoint_is_extended_again(folders, tmp_path):
    stock = folders["windows"] / "stock"
    extend_checkpoint(stock, tmp_path / "dst", longattn.Plan(rope={"factor": 2.0}), export="stock")
    config = AutoConfig.from_pretrained(tmp_path / "dst")
    assert (config.max_position_embeddings, config.rope_parameters["factor"], config.sliding_window) == (512, 8.0, 8)
    fields = read_json(tmp_path / "dst" / "config.json")
    assert fields["rope_scaling"]["factor"] == 8.0


VOCAB = ["<unk>", "<s>", "</s>", "▁", "h", "e", "l", "o", "▁h", "he", "ll", "llo", "▁he", "▁hello"]
MERGES = [("▁", "h"), ("l", "l"), ("ll", "o"), ("▁h", "e"), ("▁he", "llo")]


@pytest.mark.parametrize("legacy", [True, False])
def test_tokenizer_of_llama_reads_the_same_beside_a_mistral(tmp_path, legacy):
    """Without care it does not: a Mistral's is read from tokenizer.json alone, which says otherwise of legacy ones."""
    src = write_checkpoint(tmp_path / "src")
    ids = {token: i for i, token in enumerate(VOCAB)}
    LlamaTokenizer(vocab=ids, merges=MERGES, legacy=legacy, model_max_length=64).save_pretrained(src)
    plan = longattn.Plan(rope=YARN, attention="window:8")
    extend_checkpoint(src, tmp_path / "dst", plan, export="stock")
    before, after = (AutoTokenizer.from_pretrained(tmp_path / which) for which in ("src", "dst"))
    assert type(before) is LlamaTokenizer
    for text in ("hello hello", "hello<s>hello", " hello\nhello </s> hello"):
        assert after(text)["input_ids"] == before(text)["input_ids"]
        assert after.decode(after(text)["input_ids"]) == before.decode(before(text)["input_ids"])
    assert (before.model_max_length, after.model_max_length) == (64, 256)
