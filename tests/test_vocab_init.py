"""How the rows of new tokens are made: each initialiser against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vocab_helpers import HIDDEN, OLD_SIZE, input_rows, make_model, make_tokenizer, output_rows

from longattn.vocab import add_tokens

NEW = ["<tool>", "</tool>"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def spread(rows: torch.Tensor) -> torch.Tensor:
    """The noise allowed on a mean row: six times 0.02 standard deviations of each channel, (hidden,)."""
    return 6 * 0.02 * rows.double().std(0, unbiased=False) + rows.double().mean(0).abs() * torch.finfo(rows.dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt_neox"])
def test_mean_rows_are_near_the_mean_and_all_differ(family: str, dtype: torch.dtype) -> None:
    model, tokenizer = make_model(family, dtype), make_tokenizer()
    old = (input_rows(model), output_rows(model))
    add_tokens(model, tokenizer, [f"<n{i}>" for i in range(64)])
    for before, after in zip(old, (input_rows(model), output_rows(model)), strict=True):
        new = after[OLD_SIZE:]
        assert ((new.double() - before.double().mean(0)).abs() <= spread(before)).all()
        assert len(new.unique(dim=0)) == 64


def test_noise_of_input_and_output_rows_is_not_the_same() -> None:
    model, tokenizer = make_model("llama", torch.float64), make_tokenizer()
    old = input_rows(model), output_rows(model)
    add_tokens(model, tokenizer, ["<a>"])
    new = input_rows(model)[-1], output_rows(model)[-1]
    drawn = [(row - rows.mean(0)) / rows.std(0, unbiased=False) / 0.02 for row, rows in zip(new, old, strict=True)]
    assert all(0.5 < noise.square().mean().sqrt() < 1.5 for noise in drawn)
    assert (drawn[0] - drawn[1]).abs().max() > 0.5


def test_mean_rows_differ_in_bfloat16_where_rows_hardly_do() -> None:
    model, tokenizer = make_model("llama_tied", torch.bfloat16), make_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.002).add_(1.0)
    add_tokens(model, tokenizer, [f"<n{i}>" for i in range(64)])
    assert len(input_rows(model)[OLD_SIZE:].unique(dim=0)) == 64


def test_mean_row_depends_on_its_own_token_only() -> None:
    rows = []
    for tokens in (["<a>", "<b>", "<c>"], ["<c>", "<a>"]):
        model, tokenizer = make_model("llama"), make_tokenizer()
        report = add_tokens(model, tokenizer, tokens)
        rows.append((input_rows(model)[report.ids["<c>"]], output_rows(model)[report.ids["<c>"]]))
    assert torch.equal(rows[0][0], rows[1][0]) and torch.equal(rows[0][1], rows[1][1])


def test_mean_leaves_out_padding_and_zero_rows() -> None:
    model, tokenizer = make_model("llama_padded"), make_tokenizer()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        with torch.no_grad():
            module.weight[OLD_SIZE:] = 1e4
            module.weight[20:60] = 0
    counted = [i for i in range(OLD_SIZE) if not 20 <= i < 60]
    means = input_rows(model)[counted].mean(0), output_rows(model)[counted].mean(0)
    add_tokens(model, tokenizer, NEW, pad_to_multiple_of=256)
    for rows, mean in zip((input_rows(model), output_rows(model)), means, strict=True):
        torch.testing.assert_close(rows[-1], mean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subwords_are_the_mean_of_the_old_pieces(dtype: torch.dtype) -> None:
    model, tokenizer = make_model("llama", dtype), make_tokenizer()
    old_input, old_output = input_rows(model), output_rows(model)
    pieces = {text: make_tokenizer()(text)["input_ids"] for text in NEW}
    assert min(map(len, pieces.values())) > 1
    report = add_tokens(model, tokenizer, NEW, init="subwords")
    for text, ids in pieces.items():
        new = report.ids[text]
        assert torch.equal(input_rows(model)[new], old_input[ids].double().mean(0).to(dtype))
        assert torch.equal(output_rows(model)[new], old_output[ids].double().mean(0).to(dtype))
        assert report.input_rows[text] == f"mean of {len(ids)} pieces of {text!r}"


def test_subwords_leave_the_unknown_token_out() -> None:
    backend = Tokenizer(models.WordLevel({"[unk]": 0, "tool": 1, "call": 2, "<": 3}, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[unk]")
    model = make_model("llama")
    old = input_rows(model)
    report = add_tokens(model, tokenizer, ["tool + call"], init="subwords")
    torch.testing.assert_close(input_rows(model)[report.ids["tool + call"]], old[[1, 2]].mean(0))
    with pytest.raises(ValueError, match="init must find old tokens in the subwords of '\\?', got none"):
        add_tokens(model, tokenizer, ["?"], init="subwords")


def test_descriptions_are_the_mean_of_their_pieces() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    old = input_rows(model), output_rows(model)
    description = {"</tool>": "the tool returns", "<tool>": "hello"}
    report = add_tokens(model, tokenizer, NEW, init=description)
    for text, words in description.items():
        ids = make_tokenizer()(words)["input_ids"]
        torch.testing.assert_close(input_rows(model)[report.ids[text]], old[0][ids].mean(0))
        torch.testing.assert_close(output_rows(model)[report.ids[text]], old[1][ids].mean(0))


def test_copy_gives_the_same_rows_and_logits() -> None:
    model, tokenizer = make_model("phi_bias", torch.bfloat16), make_tokenizer()
    source = tokenizer(" hello")["input_ids"]
    assert len(source) == 1
    report = add_tokens(model, tokenizer, NEW, init="copy: hello")
    out = model(input_ids=torch.tensor([[source[0], 9], [report.ids["<tool>"], 9]])).logits
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[..., report.ids["</tool>"]], out[..., source[0]])


def test_tensors_are_taken_as_given() -> None:
    model, tokenizer = make_model("llama", torch.bfloat16), make_tokenizer()
    given, given_out = torch.randn(2, HIDDEN), torch.randn(2, HIDDEN, dtype=torch.float64)
    kept = given.clone()
    add_tokens(model, tokenizer, NEW, init=given, output_init=given_out)
    assert torch.equal(input_rows(model)[OLD_SIZE:], given.bfloat16())
    assert torch.equal(output_rows(model)[OLD_SIZE:], given_out.bfloat16())
    assert torch.equal(given, kept)


def test_functions_get_the_token_and_a_copy_of_the_matrix() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    old = input_rows(model), output_rows(model)
    seen = []

    def first_row(token: str, rows: torch.Tensor) -> torch.Tensor:
        seen.append((token, rows.clone()))
        row = rows[0].clone()
        rows.zero_()  # must not reach the model
        return row

    add_tokens(model, tokenizer, ["<a>"], init=first_row)
    assert [token for token, _ in seen] == ["<a>", "<a>"]
    assert torch.equal(seen[0][1], old[0]) and torch.equal(seen[1][1], old[1])
    assert torch.equal(input_rows(model), torch.cat([old[0], old[0][:1]]))
    assert torch.equal(output_rows(model), torch.cat([old[1], old[1][:1]]))


def test_output_init_sets_the_output_alone() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    old = input_rows(model), output_rows(model)
    report = add_tokens(model, tokenizer, NEW, init="copy:hello", output_init="subwords")
    hello = tokenizer.convert_tokens_to_ids("hello")
    ids = make_tokenizer()("<tool>")["input_ids"]
    assert torch.equal(input_rows(model)[report.ids["<tool>"]], old[0][hello])
    torch.testing.assert_close(output_rows(model)[report.ids["<tool>"]], old[1][ids].mean(0))
    assert report.output_rows["<tool>"].startswith("mean of") and report.input_rows["<tool>"].startswith("copy of")


@pytest.mark.parametrize("family", ["phi_bias", "phi_tied_bias"])
def test_output_bias_follows_its_row(family: str) -> None:
    ids = make_tokenizer()("<tool>")["input_ids"]
    hello = make_tokenizer().convert_tokens_to_ids("hello")
    for init, source in (("mean", range(OLD_SIZE)), ("subwords", ids), ("copy:hello", [hello])):
        model = make_model(family)
        old = model.get_output_embeddings().bias.detach().clone()
        add_tokens(model, make_tokenizer(), ["<tool>"], init=init)
        torch.testing.assert_close(model.get_output_embeddings().bias[OLD_SIZE], old[list(source)].mean())
        assert torch.equal(model.get_output_embeddings().bias[:OLD_SIZE], old)
