"""Checkpoints changed on disk: which bytes stay, what reloads, what is refused, and that SRC is never touched."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoints import digests, edit_json, read_json, rewrite, same_bits, stored, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import longattn
from longattn.checkpoint import extend_checkpoint, preview_checkpoint

ROPE = longattn.Plan(rope={"rope_type": "yarn", "factor": 4.0})
ATTENTION = longattn.Plan(attention="3 x window:8+sinks:2, 1 x full", train_attention="group:8+shift")
TOKENS = longattn.Plan(tokens={"tokens": [f"<t{i}>" for i in range(9)]})  # 60 tokens in 64 rows: the matrices grow
ALL = longattn.Plan(
    rope={"rope_type": "yarn", "factor": 4.0},
    attention="window:8",
    tokens={"tokens": {"pad_token": "<pad>", "extra_special_tokens": ["<tool>"]}, "init": "copy:w3"},
)
PLANS = {"rope": ROPE, "attention": ATTENTION, "tokens": TOKENS, "all": ALL}
INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

pytestmark = pytest.mark.usefixtures("src_is_untouched")


def logits(model, length=40):
    with torch.no_grad():
        return model.eval()(torch.arange(length)[None] % 60).logits


@pytest.mark.parametrize("name", PLANS)
def test_unchanged_tensors_keep_their_bytes(src, tmp_path, name):
    extend_checkpoint(src, tmp_path / "dst", PLANS[name])
    before, after = stored(src), stored(tmp_path / "dst")
    assert list(after) == list(before)
    changed = {key for key in before if not same_bits(before[key][1], after[key][1])}
    assert changed == ({INPUT, OUTPUT} if PLANS[name].tokens else set())
    assert {key: file for key, (file, _) in after.items()} == {key: file for key, (file, _) in before.items()}
    for key in changed:
        assert after[key][1].dtype == before[key][1].dtype
        assert same_bits(after[key][1][:60], before[key][1][:60])
    untouched = {file for file, _ in before.values()} - {before[key][0] for key in changed}
    old, new = digests(src), digests(tmp_path / "dst")
    assert len(untouched) >= 2 and all(old[file] == new[file] for file in untouched)


def across_file_systems(*_):
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.mark.parametrize("copy", [None, across_file_systems, lambda *_: 0])
def test_bytes_are_copied_where_the_kernel_does_not(src, tmp_path, monkeypatch, copy):
    extend_checkpoint(src, tmp_path / "expected", ROPE)
    if copy is None:
        monkeypatch.delattr("os.copy_file_range", raising=False)
    else:
        monkeypatch.setattr("os.copy_file_range", copy, raising=False)
    extend_checkpoint(src, tmp_path / "dst", ROPE)
    expected, found = digests(tmp_path / "expected"), digests(tmp_path / "dst")
    assert {name: found[name] for name in found if "safetensors" in name} == {
        name: expected[name] for name in expected if "safetensors" in name
    }


@pytest.mark.parametrize("name", PLANS)
def test_index_has_right_sizes(src, tmp_path, name):
    extend_checkpoint(src, tmp_path / "dst", PLANS[name])
    index = read_json(tmp_path / "dst" / "model.safetensors.index.json")
    tensors = stored(tmp_path / "dst")
    assert index["weight_map"] == {key: file for key, (file, _) in tensors.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for _, tensor in tensors.values())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tie", [False, True])
def test_reload_equals_model_extended_in_memory(tmp_path, family, tie):
    src = write_checkpoint(tmp_path / "src", family, tie_word_embeddings=tie)
    model = AutoModelForCausalLM.from_pretrained(src)
    report = longattn.extend(model, AutoTokenizer.from_pretrained(src), ALL)
    on_disk = extend_checkpoint(src, tmp_path / "dst", ALL)
    assert (OUTPUT in stored(tmp_path / "dst")) is not tie
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert torch.equal(logits(reloaded), logits(model))
    assert reloaded.config.longattn == model.config.longattn
    assert [change for change in on_disk.changes if change not in report.changes] == []
    assert on_disk.tokens == report.tokens


@pytest.mark.parametrize("name", ["rope", "tokens"])
def test_rope_and_token_plans_need_no_longattn_at_load(src, tmp_path, name):
    dst = tmp_path / "dst"
    extend_checkpoint(src, dst, PLANS[name])
    model = AutoModelForCausalLM.from_pretrained(src)
    longattn.extend(model, AutoTokenizer.from_pretrained(src), PLANS[name])
    torch.save(logits(model), tmp_path / "expected.pt")
    script = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "with torch.no_grad(): found = model(torch.arange(40)[None] % 60).logits\n"
        "assert torch.equal(found, torch.load(sys.argv[2])), 'logits differ'\n"
        "assert not any(name.partition('.')[0] == 'longattn' for name in sys.modules)\n"
    )
    arguments = [sys.executable, "-c", script, str(dst), str(tmp_path / "expected.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_other_files_are_carried_over(src, tmp_path):
    dst = tmp_path / "dst"
    extend_checkpoint(src, dst, ROPE)
    old, new = digests(src), digests(dst)
    changed = {"config.json", "tokenizer_config.json", "README.md"}
    assert {name for name in new if new[name] != old.get(name)} == changed
    assert set(old) - set(new) == {".cache/download.lock"}
    before, after = read_json(src / "tokenizer_config.json"), read_json(dst / "tokenizer_config.json")
    assert (before.pop("model_max_length"), after.pop("model_max_length")) == (64, 256)
    assert before == after


def test_weights_in_other_formats_are_left_behind(src, tmp_path):
    copied = write_checkpoint(tmp_path / "src")
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "training_args.bin"):
        (copied / name).write_bytes(b"old")
    extend_checkpoint(copied, tmp_path / "dst", ROPE)
    assert set(digests(tmp_path / "dst")) == set(digests(src)) - {".cache/download.lock"}


def test_tokens_reach_tokenizer_and_generation_config(src, tmp_path):
    dst = tmp_path / "dst"
    report = extend_checkpoint(src, dst, ALL)
    tokenizer = AutoTokenizer.from_pretrained(dst)
    pad, tool = report.tokens.ids["<pad>"], report.tokens.ids["<tool>"]
    assert tokenizer("w3 <tool> w4")["input_ids"] == [6, tool, 7]
    assert (tokenizer.pad_token, tokenizer.model_max_length) == ("<pad>", 256)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(src).chat_template
    generation = GenerationConfig.from_pretrained(dst)
    assert (generation.pad_token_id, generation.temperature, generation.eos_token_id) == (pad, 0.7, 2)
    assert AutoModelForCausalLM.from_pretrained(dst).config.pad_token_id == pad


def test_single_file_and_mixed_dtypes_are_served(tmp_path):
    src = write_checkpoint(tmp_path / "src", shard_size="1GB")
    extend_checkpoint(src, tmp_path / "dst", TOKENS)
    assert not (tmp_path / "dst" / "model.safetensors.index.json").exists()
    dtypes = {tensor.dtype for _, tensor in stored(tmp_path / "dst").values()}
    assert dtypes == {torch.bfloat16, torch.float32}
    assert stored(tmp_path / "dst")[INPUT][1].shape[0] == 69


def test_tied_head_that_is_stored_follows(tmp_path):
    src = write_checkpoint(tmp_path / "src")
    edit_json(src / "config.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.weight differs from the input embedding"):
        extend_checkpoint(src, tmp_path / "dst", TOKENS)
    file, _ = stored(src)[OUTPUT]
    tensors = {**load_file(src / file), OUTPUT: stored(src)[INPUT][1].clone()}
    save_file(tensors, src / file, metadata={"format": "pt"})
    extend_checkpoint(src, tmp_path / "dst", TOKENS)
    after = stored(tmp_path / "dst")
    assert same_bits(after[INPUT][1], after[OUTPUT][1]) and after[INPUT][1].shape[0] == 69


def test_extended_checkpoint_is_extended_again(src, tmp_path):
    extend_checkpoint(src, tmp_path / "once", ALL)
    extend_checkpoint(tmp_path / "once", tmp_path / "twice", longattn.Plan(rope={"factor": 2.0}))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "twice").config
    assert (config.max_position_embeddings, config.rope_parameters["factor"]) == (512, 8.0)
    assert read_json(tmp_path / "twice" / "config.json")["attn_implementation"] == "longattn"
    assert (config.longattn["plan"], config.longattn["earlier_plans"]) == ({"rope": {"factor": 2.0}}, [ALL.to_dict()])
    assert config.longattn["original"]["max_position_embeddings"] == 64


def test_progress_reaches_the_end_once(src, tmp_path):
    seen = []
    extend_checkpoint(src, tmp_path / "dst", TOKENS, progress=lambda *piece: seen.append(piece))
    total = sum(tensor.nbytes for _, tensor in stored(tmp_path / "dst").values())
    assert {piece[0] for piece in seen} == set(stored(src))
    done = [piece[1] for piece in seen]
    assert done == sorted(done) and done[-1] == total and {piece[2] for piece in seen} == {total}


def test_preview_reports_the_same_and_writes_nothing(src, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = preview_checkpoint(src, ALL)
    assert list(tmp_path.iterdir()) == []
    assert report == extend_checkpoint(src, tmp_path / "dst", ALL)


def test_generation_config_that_transformers_will_not_save_is_carried_over(tmp_path):
    src, dst = write_checkpoint(tmp_path / "src"), tmp_path / "dst"
    stored = {"_from_model_config": True, "do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (src / "generation_config.json").write_text(json.dumps(stored))
    extend_checkpoint(src, dst, longattn.Plan(tokens={"tokens": {"pad_token": "<pad>"}}))
    assert read_json(dst / "generation_config.json") == {**stored, "pad_token_id": 60}


def test_limit_of_generation_follows_on_disk(tmp_path):
    src, dst = write_checkpoint(tmp_path / "src"), tmp_path / "dst"
    edit_json(src / "generation_config.json", max_length=64)
    extend_checkpoint(src, dst, ROPE)
    assert read_json(dst / "generation_config.json") == {**read_json(src / "generation_config.json"), "max_length": 256}


def save_decoder_alone(tensors):
    del tensors["lm_head.weight"]
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def store_frequencies(tensors):
    """As checkpoints of transformers 4 did."""
    for layer in range(4):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def store_another_part(tensors):
    tensors["value_head.weight"] = torch.ones(1, 32)


def drop_tied_head(tensors):
    del tensors["lm_head.weight"]


@pytest.mark.parametrize("edit", [save_decoder_alone, store_frequencies, store_another_part, drop_tied_head])
def test_tensors_more_or_less_than_the_model_has_are_carried_over(src, tmp_path, edit):
    other = tmp_path / "other"
    shutil.copytree(src, other)
    rewrite(other, edit)
    edit_json(other / "config.json", tie_word_embeddings=edit is drop_tied_head)
    extend_checkpoint(other, tmp_path / "dst", ROPE)
    before, after = stored(other), stored(tmp_path / "dst")
    assert list(before) == list(after) and all(same_bits(before[name][1], after[name][1]) for name in before)
    if edit is not save_decoder_alone:
        extend_checkpoint(other, tmp_path / "tokens", TOKENS)
        assert stored(tmp_path / "tokens")[INPUT][1].shape[0] == 69
