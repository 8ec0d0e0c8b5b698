"""What adding tokens refuses, in which words, and that nothing has changed then."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast
from vocab_helpers import HIDDEN, OLD_SIZE, assert_same, make_model, make_tokenizer, snapshot

from longattn.vocab import add_tokens, prepare_tokens

HEADING = "add_tokens: "


def refused(match: str, error: type[Exception] = ValueError, family: str = "llama", tokens=("<a>", "<b>"), **kwargs):
    """Call add_tokens on a new model and tokenizer, expecting an error and no change."""
    model, tokenizer = make_model(family), make_tokenizer()
    before = snapshot(model, tokenizer)
    with pytest.raises(error, match="^" + HEADING + match):
        add_tokens(model, tokenizer, tokens, **kwargs)
    assert_same(before, snapshot(model, tokenizer))


@pytest.mark.parametrize(
    ("tokens", "error", "match"),
    [
        (["hello"], ValueError, r"tokens must be new, got 'hello', which has id \d+"),
        (["<keep>"], ValueError, "tokens must be new, got '<keep>', which has id 2"),
        ([" hello"], ValueError, r"tokens must be new, got ' hello', which has id \d+"),
        (["<a>", "<b>", "<a>"], ValueError, "tokens must not repeat, got '<a>' twice"),
        (["<a>", AddedToken("<a>")], ValueError, "tokens must not repeat, got '<a>' twice"),
        ({"pad_token": "<a>", "eos_token": "<a>"}, ValueError, "tokens must not repeat, got '<a>' twice"),
        (["<a>", ""], ValueError, "tokens must not be empty, got ''"),
        ([" \n\t "], ValueError, "special tokens must hold more than whitespace"),
        ([], ValueError, "tokens must name at least one token, got none"),
        ({}, ValueError, "tokens must name at least one token, got none"),
        (["<a>", 3], TypeError, "tokens must be texts or AddedToken, got 3"),
        ({"pad_token": None}, TypeError, "tokens must be texts or AddedToken, got None"),
        ("<a>", TypeError, "tokens must be a list of tokens or a mapping from role to token, got '<a>'"),
        (
            {"padding": "<a>"},
            ValueError,
            "tokens must map roles, any of bos_token, .*extra_special_tokens, got 'padding'",
        ),
        ({"extra_special_tokens": "<a>"}, TypeError, r"tokens\['extra_special_tokens'\] must be a list of tokens"),
        (["naïve"], ValueError, "tokens must be decoded to themselves, got '.*' for 'One two naïve three.'"),
    ],
)
def test_tokens_are_refused(tokens, error, match) -> None:
    refused(match, error, tokens=tokens)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"special": 1}, TypeError, "special must be a bool, got 1"),
        ({"init": "average"}, ValueError, "init must be 'mean', 'subwords', 'copy:<token>', .* got 'average'"),
        ({"output_init": "average"}, ValueError, "output_init must be 'mean', .* got 'average'"),
        ({"init": 3}, TypeError, "init must be a text, a mapping .* got 3"),
        ({"init": "copy:frob"}, ValueError, "init must copy a token that the tokenizer has, got 'frob'"),
        ({"init": "copy:<a>"}, ValueError, "init must copy a token that the tokenizer has, got '<a>'"),
        ({"init": {"<a>": "hello"}}, ValueError, "init must describe every token, got no description of '<b>'"),
        (
            {"init": {"<a>": "x", "<b>": "y", "<c>": "z"}},
            ValueError,
            "init must describe only tokens that are added, got '<c>'",
        ),
        ({"init": {"<a>": "x", "<b>": 3}}, TypeError, r"init\['<b>'\] must be a text, got 3"),
        ({"init": {"<a>": "x", "<b>": ""}}, ValueError, "init must find old tokens in the description of '<b>'"),
        ({"init": torch.zeros(2, 3), "output_init": "mean"}, ValueError, r"init must have shape \(2, 16\), .*\(2, 3\)"),
        ({"init": torch.zeros(2, HIDDEN)}, ValueError, "output_init must be given where init is a tensor"),
        ({"init": torch.zeros(2, HIDDEN, dtype=torch.int64)}, TypeError, "init must be a tensor of real numbers"),
        (
            {"init": torch.full((2, HIDDEN), torch.nan), "output_init": "mean"},
            ValueError,
            "init must give input rows that are finite in torch.float32, got other values for '<a>': given",
        ),
        ({"init": lambda token, rows: 3}, TypeError, "init must return a floating-point tensor for input rows, got 3"),
        ({"init": lambda token, rows: rows}, ValueError, r"init must return input rows of shape \(16,\)"),
        ({"init": lambda token, rows: rows[0] / 0}, ValueError, "init must give input rows that are finite"),
        ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of must be at least 1, got 0"),
        ({"pad_to_multiple_of": 8.0}, TypeError, "pad_to_multiple_of must be an int, got 8.0"),
        ({"pad_to_multiple_of": True}, TypeError, "pad_to_multiple_of must be an int, got True"),
    ],
)
def test_arguments_are_refused(kwargs, error, match) -> None:
    refused(match, error, **kwargs)


def test_output_init_is_refused_without_output_rows_of_their_own() -> None:
    refused("output_init must be None as the model ties its output", family="llama_tied", output_init="mean")
    refused("output_init must be None as the model has no output", family="bert_encoder", output_init="mean")


def test_special_false_is_refused_for_roles_and_special_tokens() -> None:
    refused("special must be True where tokens maps roles", tokens={"pad_token": "<pad>"}, special=False)
    refused("special must be True for a special AddedToken", tokens=[AddedToken("<pad>", special=True)], special=False)


def test_rows_that_overflow_float16_are_refused() -> None:
    model, tokenizer = make_model("llama_tied", torch.float16), make_tokenizer()
    before = snapshot(model, tokenizer)
    with pytest.raises(ValueError, match="must give input rows that are finite in torch.float16"):
        add_tokens(model, tokenizer, ["<a>"], init=torch.full((1, HIDDEN), 1e5))
    assert_same(before, snapshot(model, tokenizer))


def test_error_in_the_middle_of_a_function_changes_nothing() -> None:
    def fails_second(token: str, rows: torch.Tensor) -> torch.Tensor:
        if token == "<b>":
            raise KeyError("no vector for <b>")
        return rows[0]

    model, tokenizer = make_model("llama"), make_tokenizer()
    before = snapshot(model, tokenizer)
    with pytest.raises(KeyError, match="no vector for <b>"):
        add_tokens(model, tokenizer, ["<a>", "<b>"], init=fails_second)
    assert_same(before, snapshot(model, tokenizer))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "llama_padded", "qwen2_padded", "phi_bias", "bert_encoder"])
@pytest.mark.parametrize("multiple", [None, 64])
def test_error_while_applying_puts_everything_back(family: str, multiple: int | None) -> None:
    model, tokenizer = make_model(family), make_tokenizer()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model, tokenizer)
    plan = prepare_tokens(model, tokenizer, {"pad_token": "<pad>", "eos_token": "<end>"}, pad_to_multiple_of=multiple)

    def broken(*args: object, **kwargs: object) -> None:
        type(tokenizer).add_special_tokens(tokenizer, *args, **kwargs)
        raise OSError("out of luck")

    vars(tokenizer)["add_special_tokens"] = broken  # after the model has grown, and with the tokens in
    with pytest.raises(OSError, match="out of luck"):
        plan.apply()
    del vars(tokenizer)["add_special_tokens"]
    assert_same(before, snapshot(model, tokenizer))


def test_tokenizer_of_another_model_is_refused() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    tokenizer.add_tokens(["<more>"])
    before = snapshot(model, tokenizer)
    with pytest.raises(ValueError, match=f"tokenizer must have ids below the {OLD_SIZE} rows .* got {OLD_SIZE}"):
        add_tokens(model, tokenizer, ["<a>"])
    assert_same(before, snapshot(model, tokenizer))


def test_new_id_that_another_token_has_is_refused() -> None:
    vocab = {"[unk]": 0, "a": 1, "b": 3}  # three entries, so the next id handed out is 3
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="[unk]")))
    with pytest.raises(ValueError, match="tokens must get ids of their own from the tokenizer, got 3 for '<a>'"):
        add_tokens(make_model("llama"), tokenizer, ["<a>"])


def test_role_that_the_tokenizer_adds_by_its_own_template_is_refused() -> None:
    tokenizer = make_tokenizer(add_bos_token=True)
    tokenizer._add_bos_token = False  # as for checkpoints whose tokenizer.json alone holds the template
    assert tokenizer("hello")["input_ids"][0] == 0
    with pytest.raises(ValueError, match="tokens must not replace the bos_token '<s>', which this tokenizer's post"):
        add_tokens(make_model("llama"), tokenizer, {"bos_token": "<start>"})


def test_embeddings_that_cannot_grow_are_refused() -> None:
    cases = []
    quantised = make_model("llama")
    weight = torch.nn.Parameter(torch.zeros(OLD_SIZE, HIDDEN, dtype=torch.int8), requires_grad=False)
    quantised.lm_head.weight = weight
    cases.append((quantised, TypeError, "plain floating-point output embedding, .* got Tensor of torch.int8"))
    cases.append(
        (make_model("llama").to("meta"), ValueError, "real values in its input embedding, got the meta device")
    )
    wrapped = make_model("llama")
    wrapped.lm_head = torch.nn.Sequential(wrapped.lm_head)
    cases.append((wrapped, TypeError, "an nn.Linear or nn.Embedding as its output embedding, got Sequential"))
    shorter = make_model("llama")
    shorter.lm_head = torch.nn.Linear(HIDDEN, OLD_SIZE - 1, bias=False)
    cases.append((shorter, ValueError, f"as many rows in its output as in its input embedding .* got {OLD_SIZE - 1}"))
    untied = make_model("llama_tied")
    untied.lm_head.weight = torch.nn.Parameter(copy.deepcopy(untied.lm_head.weight.data))
    cases.append((untied, ValueError, "must not have output rows of its own where its config ties them"))
    for model, error, match in cases:
        with pytest.raises(error, match=HEADING + "model must .*" + match.removeprefix("must ")):
            add_tokens(model, make_tokenizer(), ["<a>"])


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        add_tokens(torch.nn.Linear(2, 2), make_tokenizer(), ["<a>"])
    with pytest.raises(TypeError, match="tokenizer must be a transformers tokenizer, got NoneType"):
        add_tokens(make_model("llama"), None, ["<a>"])
