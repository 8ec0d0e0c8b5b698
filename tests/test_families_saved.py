"""Every served family through memory and disk: reload, restore, new tokens, checkpoints that are changed as files."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import STORED_TOKENS, same_bits, stored
from hf_models import ALL_FAMILIES, build, build_tokenizer, tokens
from test_families import ATTENTION, rope_plan
from transformers import AutoModelForCausalLM, AutoTokenizer

from longattn.checkpoint import extend_checkpoint
from longattn.plan import Plan
from longattn.surgery import extend, restore
from longattn.vocab import add_tokens

families = pytest.mark.parametrize("family", ALL_FAMILIES)
IDS = tokens(2, 40)


def build_float32(family: str):
    """With the experts that transformers picks when it loads a checkpoint."""
    return build(family, torch.float32, experts_implementation=None)


def whole_plan(family: str) -> Plan:
    return Plan(
        attention=ATTENTION,
        rope=rope_plan(family),
        train_attention="group:8+shift",
        tokens={"tokens": ["<a>", "<b>"], "init": "mean", "pad_to_multiple_of": 8},
    )


def config_json(folder):
    return json.loads((folder / "config.json").read_text())


def reload(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


@families
@torch.no_grad()
def test_reload_gives_the_same_bits_and_restore_the_stock_ones(family, tmp_path):
    model, stock = build_float32(family), build_float32(family)
    extend(model, None, Plan(attention=ATTENTION, rope=rope_plan(family), train_attention="group:8+shift"))
    assert not torch.equal(model(IDS).logits, stock(IDS).logits)
    model.save_pretrained(tmp_path / "1")
    again = reload(tmp_path / "1")
    assert again.config._attn_implementation == "longattn"
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    for changed in (model, again):
        restore(changed)
        assert torch.equal(changed(IDS).logits, stock(IDS).logits)
        assert changed.config._attn_implementation == stock.config._attn_implementation
    for name, saved in {"stock": stock, "changed": model, "reloaded": again}.items():
        saved.save_pretrained(tmp_path / name)
        assert config_json(tmp_path / name) == config_json(tmp_path / "stock")


@families
@torch.no_grad()
def test_a_rope_alone_needs_no_longattn_and_reloads(family, tmp_path):
    model = build_float32(family)
    length = model.config.max_position_embeddings
    extend(model, None, Plan(rope=rope_plan(family)))
    assert model.config.max_position_embeddings == 4 * length
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    assert "attn_implementation" not in config_json(tmp_path)
    assert again.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@families
@torch.no_grad()
def test_checkpoints_on_disk_become_what_models_become(family, tmp_path):
    model = build_float32(family)
    model.save_pretrained(tmp_path / "src", max_shard_size="20KB")
    build_tokenizer(STORED_TOKENS).save_pretrained(tmp_path / "src")
    model, tokenizer = reload(tmp_path / "src"), AutoTokenizer.from_pretrained(tmp_path / "src")
    report = extend(model, tokenizer, whole_plan(family))
    assert report.tokens is not None
    model.save_pretrained(tmp_path / "memory")
    on_disk = extend_checkpoint(tmp_path / "src", tmp_path / "dst", whole_plan(family))
    assert on_disk.tokens.ids == report.tokens.ids
    expected, got = stored(tmp_path / "memory"), stored(tmp_path / "dst")
    assert expected.keys() == got.keys()
    assert all(same_bits(expected[name][1], got[name][1]) for name in got)
    again = reload(tmp_path / "dst")
    ids = torch.cat([IDS, torch.tensor([list(report.tokens.ids.values())] * 2)], 1)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert config_json(tmp_path / "dst") == config_json(tmp_path / "memory")


@families
@torch.no_grad()
def test_new_tokens_are_means_and_leave_the_old_ones(family):
    model, stock, tokenizer = build(family), build(family), build_tokenizer(STORED_TOKENS)
    report = add_tokens(model, tokenizer, [f"<{i}>" for i in range(6)])
    old, new = stock.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert new.shape[0] == 66 and torch.equal(new[:60], old[:60])
    spread = old[3:60].std(0)
    assert bool(((new[60:] - old[:60].mean(0)).abs() < spread).all())
    heads = model.get_output_embeddings().weight
    tied = stock.get_output_embeddings().weight is old
    assert report.tied == tied == (heads is new) == model.config.tie_word_embeddings
    # logits of old tokens are those of before
    assert torch.equal(model(IDS % 60).logits[..., :60], stock(IDS % 60).logits[..., :60])
    assert model.config.vocab_size == 66


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_restore_takes_what_is_there_where_the_first_attention_is_not(family):
    model = build(family)
    there = model.config._attn_implementation  # sdpa, or eager where transformers' sdpa can't attend so
    extend(model, None, Plan(attention=ATTENTION))
    model.config.longattn["original"]["attn_implementation"] = "flash_attention_2"  # of another machine
    restore(model)
    assert model.config._attn_implementation == there
    assert bool(model(IDS).logits.isfinite().all())
