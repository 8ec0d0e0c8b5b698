"""Adding tokens: ids, rows, sizes, tying, configs, and that all of it survives saving."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer
from vocab_helpers import (
    FAMILIES,
    HIDDEN,
    OLD_SIZE,
    PADDED_ROWS,
    assert_same,
    input_rows,
    logits,
    make_model,
    make_tokenizer,
    output_rows,
    snapshot,
)

from longattn.vocab import add_tokens, prepare_tokens

CAUSAL = [family for family in FAMILIES if family != "bert_encoder"]
NEW = ["<tool>", "</tool>"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_add_tokens_changes_new_rows_only(family: str, dtype: torch.dtype) -> None:
    model, tokenizer = make_model(family, dtype), make_tokenizer()
    before = copy.deepcopy(model)
    report = add_tokens(model, tokenizer, NEW)
    assert report.ids == {"<tool>": OLD_SIZE, "</tool>": OLD_SIZE + 1}
    assert report.tokenizer_size == (OLD_SIZE, OLD_SIZE + 2) == (OLD_SIZE, len(tokenizer))
    rows = max(before.config.vocab_size, OLD_SIZE + 2)
    assert report.rows == (before.config.vocab_size, rows)
    assert model.config.vocab_size == rows
    new = list(report.ids.values())
    for name, value in model.state_dict().items():
        old = before.state_dict()[name]
        assert value.dtype == old.dtype
        if value.shape == old.shape and value.shape[0] != before.config.vocab_size:
            assert torch.equal(value, old), name
        else:
            assert value.shape == (rows, *old.shape[1:]), name
            kept = [i for i in range(len(old)) if i not in new]
            assert torch.equal(value[kept], old[kept]), name
            assert value[new].isfinite().all(), name
            if len(old) > max(new):
                assert not torch.equal(value[new], old[new]), name


@pytest.mark.parametrize("family", CAUSAL)
def test_add_tokens_keeps_old_logits_and_survives_saving(family: str, tmp_path) -> None:
    model, tokenizer = make_model(family), make_tokenizer()
    text = "hello tool, return x"
    before = logits(model, tokenizer, text)
    report = add_tokens(model, tokenizer, {"pad_token": "<pad>", "extra_special_tokens": NEW}, init="subwords")
    after = logits(model, tokenizer, text)
    torch.testing.assert_close(after[..., :OLD_SIZE], before[..., :OLD_SIZE])
    new_text = "hello <tool>x</tool><pad> world"
    expected = logits(model, tokenizer, new_text)
    model.save_pretrained(tmp_path)
    # apart, as for Qwen2 a tokenizer beside the model would become a Qwen2Tokenizer, which adds a token of its own
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    reloaded = type(model).from_pretrained(tmp_path).eval()
    back = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert back.get_vocab() == tokenizer.get_vocab()
    assert {token: back.convert_tokens_to_ids(token) for token in report.ids} == report.ids
    assert back(new_text)["input_ids"] == tokenizer(new_text)["input_ids"]
    assert set(back.all_special_tokens) == {"<s>", "</s>", "<keep>", "<pad>", *NEW}
    assert back.pad_token_id == reloaded.config.pad_token_id == reloaded.generation_config.pad_token_id
    assert torch.equal(logits(reloaded, back, new_text), expected)


@pytest.mark.parametrize("family", CAUSAL)
def test_add_tokens_keeps_tying(family: str) -> None:
    model, tokenizer = make_model(family), make_tokenizer()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    report = add_tokens(model, tokenizer, NEW)
    assert report.tied == tied
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.get_input_embeddings().num_embeddings == report.rows[1]
    assert model.get_output_embeddings().out_features == report.rows[1]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt_neox", "phi_bias"])
def test_add_tokens_keeps_modules_parameters_hooks_and_flags(family: str) -> None:
    model, tokenizer = make_model(family), make_tokenizer()
    model.get_output_embeddings().weight.requires_grad_(False)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    modules = [id(module) for module in model.modules()]
    add_tokens(model, tokenizer, NEW)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert [id(module) for module in model.modules()] == modules
    logits(model, tokenizer, "<tool>")
    assert seen == [OLD_SIZE + 2]


def test_add_tokens_lets_a_model_with_gradients_train_on() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()

    def step(text: str) -> None:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()

    step("hello world")
    add_tokens(model, tokenizer, NEW)
    step("hello <tool> world")
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert weight.grad is not None and weight.grad.shape == weight.shape
        assert weight.grad[OLD_SIZE].abs().sum() > 0


def test_padding_zone_is_used_first_and_never_cut_off() -> None:
    model, tokenizer = make_model("qwen2_padded"), make_tokenizer()
    before = input_rows(model)
    report = add_tokens(model, tokenizer, NEW, init="copy:hello")
    assert report.rows == (PADDED_ROWS, PADDED_ROWS) and report.padding_rows == []
    after = input_rows(model)
    source = before[tokenizer.convert_tokens_to_ids("hello")]
    assert torch.equal(after[OLD_SIZE : OLD_SIZE + 2], source.expand(2, -1))
    assert torch.equal(after[OLD_SIZE + 2 :], before[OLD_SIZE + 2 :])


def test_new_rows_reach_from_the_padding_zone_beyond_it() -> None:
    model, tokenizer = make_model("llama_padded"), make_tokenizer()
    count = PADDED_ROWS - OLD_SIZE + 3
    report = add_tokens(model, tokenizer, [f"<n{i}>" for i in range(count)], init="copy:hello")
    assert report.rows == (PADDED_ROWS, PADDED_ROWS + 3)
    for rows in (input_rows(model), output_rows(model)):
        assert torch.equal(rows[OLD_SIZE:], rows[tokenizer.convert_tokens_to_ids("hello")].expand(count, -1))


@pytest.mark.parametrize("family", ["llama", "phi_tied_bias", "phi_bias"])
def test_pad_to_multiple_of_fills_padding_with_the_mean(family: str) -> None:
    model, tokenizer = make_model(family), make_tokenizer()
    old_input, old_head = input_rows(model), copy.deepcopy(model.get_output_embeddings())
    report = add_tokens(model, tokenizer, NEW, pad_to_multiple_of=64)
    rows = -(-(OLD_SIZE + 2) // 64) * 64
    assert report.rows == (OLD_SIZE, rows) == (OLD_SIZE, len(input_rows(model)))
    assert report.padding_rows == list(range(OLD_SIZE + 2, rows))
    torch.testing.assert_close(input_rows(model)[OLD_SIZE + 2 :], old_input.mean(0).expand(rows - OLD_SIZE - 2, -1))
    expected = old_head.weight.mean(0).expand(rows - OLD_SIZE - 2, -1)
    torch.testing.assert_close(output_rows(model)[OLD_SIZE + 2 :], expected)
    if old_head.bias is not None:
        new = model.get_output_embeddings().bias[OLD_SIZE:]
        torch.testing.assert_close(new, old_head.bias.mean().expand(rows - OLD_SIZE))


def test_roles_go_into_tokenizer_config_and_generation_config() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    model.generation_config.eos_token_id = [7, 1]
    roles = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": AddedToken("<unk>", special=True)}
    report = add_tokens(model, tokenizer, roles)
    pad, end, unk = report.ids.values()
    assert report.roles == {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (pad, end, unk)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (pad, end)
    assert model.generation_config.pad_token_id == pad
    assert model.generation_config.eos_token_id == [7, end]
    assert model.config.bos_token_id == 0
    assert "unk_token_id" not in model.config.to_dict()
    assert tokenizer.extra_special_tokens == ["<keep>"]


def test_role_that_the_tokenizer_adds_itself_is_followed() -> None:
    tokenizer = make_tokenizer(add_bos_token=True)
    assert tokenizer("hello")["input_ids"][0] == 0
    report = add_tokens(make_model("llama"), tokenizer, {"bos_token": "<start>"})
    assert tokenizer("hello")["input_ids"][0] == report.ids["<start>"]


def test_second_call_keeps_the_first_ones_special_tokens() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    add_tokens(model, tokenizer, ["<a>"])
    add_tokens(model, tokenizer, ["<b>"])
    assert tokenizer.extra_special_tokens == ["<keep>", "<a>", "<b>"]
    ids = tokenizer("x<a>y <b> <keep>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["xy"]


def test_plain_tokens_are_not_special() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    report = add_tokens(model, tokenizer, ["frobnicate", AddedToken("foo", single_word=True)], special=False)
    assert not report.special and tokenizer.extra_special_tokens == ["<keep>"]
    frob, foo = report.ids.values()
    assert frob in tokenizer("unfrobnicated")["input_ids"]
    assert foo not in tokenizer("food")["input_ids"] and foo in tokenizer("a foo b")["input_ids"]
    assert "frobnicate" in tokenizer.decode([frob], skip_special_tokens=True)


def test_model_on_the_meta_device_with_real_embeddings() -> None:
    whole, tokenizer = make_model("phi_bias"), make_tokenizer()
    model = copy.deepcopy(whole).to("meta")
    for part, source in (
        (model.get_input_embeddings(), whole.get_input_embeddings()),
        (model.get_output_embeddings(), whole.get_output_embeddings()),
    ):
        for name, value in source.named_parameters():
            setattr(part, name, torch.nn.Parameter(value.detach().clone()))
    report = add_tokens(model, tokenizer, NEW, pad_to_multiple_of=8)
    add_tokens(whole, make_tokenizer(), NEW, pad_to_multiple_of=8)
    assert report.rows[1] % 8 == 0
    for (name, value), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        if name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
            assert torch.equal(value, expected), name
        else:
            assert value.is_meta, name


def test_add_tokens_has_no_random_state() -> None:
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        model = make_model("phi_bias", torch.bfloat16)
        add_tokens(model, make_tokenizer(), NEW, pad_to_multiple_of=64)
        assert torch.equal(torch.get_rng_state(), state)
        made.append(model.state_dict())
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=0)


def test_plan_changes_nothing_until_applied_and_can_be_undone() -> None:
    model, tokenizer = make_model("phi_bias"), make_tokenizer()
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()
    before = snapshot(model, tokenizer)
    plan = prepare_tokens(model, tokenizer, {"pad_token": "<pad>"}, pad_to_multiple_of=64)
    assert_same(dict(before), snapshot(model, tokenizer))
    assert plan.apply() is plan.report
    assert tokenizer.pad_token == "<pad>"
    plan.undo()
    assert_same(before, snapshot(model, tokenizer))
    with pytest.raises(RuntimeError, match="nothing was applied"):
        plan.undo()


def test_plan_refuses_a_model_or_tokenizer_that_moved_on() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    plan = prepare_tokens(model, tokenizer, ["<a>"])
    tokenizer.add_tokens(["<b>"])
    with pytest.raises(RuntimeError, match="the tokenizer was changed since"):
        plan.apply()
    plan = prepare_tokens(model, make_tokenizer(), ["<a>"])
    model.resize_token_embeddings(OLD_SIZE + 5, mean_resizing=False)
    with pytest.raises(RuntimeError, match="embeddings were changed since"):
        plan.apply()


def test_report_reads_and_serialises() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    report = add_tokens(model, tokenizer, {"pad_token": "<pad>"}, init="copy:hello", output_init="mean")
    text = str(report)
    assert f"tokenizer {OLD_SIZE} -> {OLD_SIZE + 1} tokens, embeddings {OLD_SIZE} -> {OLD_SIZE + 1} rows" in text
    assert "'<pad>'" in text and "pad_token" in text and "copy of 'hello'" in text
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.output_rows == {"<pad>": "mean"} and report.tied is False


@settings(max_examples=40, deadline=None, database=None)
@given(
    texts=st.lists(st.text(min_size=0, max_size=6), min_size=1, max_size=5),
    special=st.booleans(),
    multiple=st.sampled_from([None, 1, 8]),
)
def test_any_list_of_tokens_is_added_whole_or_refused_whole(texts: list[str], special: bool, multiple) -> None:
    model, tokenizer = make_model("llama_tied", torch.bfloat16), make_tokenizer()
    before = snapshot(model, tokenizer)
    old = input_rows(model)
    try:
        report = add_tokens(model, tokenizer, texts, special=special, pad_to_multiple_of=multiple)
    except ValueError as error:
        assert str(error).startswith("add_tokens: ")
        assert_same(before, snapshot(model, tokenizer))
        return
    assert list(report.ids) == texts
    assert sorted(report.ids.values()) == list(range(OLD_SIZE, OLD_SIZE + len(texts)))
    rows = input_rows(model)
    assert rows.shape == (report.rows[1], HIDDEN) and torch.equal(rows[:OLD_SIZE], old)
    assert len(rows[list(report.ids.values())].unique(dim=0)) == len(texts)
    for text, new in report.ids.items():
        assert new in tokenizer(f"One two {text} three.")["input_ids"]
        assert text.strip() in tokenizer.decode([new])
