"""What modules copied out of the config follows new tokens, as it would in a model that is loaded anew."""

from __future__ import annotations

import pytest
from vocab_helpers import make_model, make_tokenizer

from longattn.vocab import prepare_tokens

SIZES = ("padding_idx", "vocab_size", "num_embeddings", "out_features")


def sizes(model) -> list[dict[str, object]]:
    return [{name: vars(module).get(name) for name in SIZES} for module in model.modules()]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2_padded"])
def test_modules_hold_what_a_reload_gives_them(family: str, tmp_path) -> None:
    model, tokenizer = make_model(family), make_tokenizer()
    before = sizes(model)
    plan = prepare_tokens(model, tokenizer, {"pad_token": "<new pad>", "extra_special_tokens": ["<tool>"]})
    pad = plan.apply().ids["<new pad>"]
    model.save_pretrained(tmp_path)
    assert sizes(model) == sizes(type(model).from_pretrained(tmp_path)) != before
    assert model.get_input_embeddings().padding_idx == pad
    plan.undo()
    assert sizes(model) == before


def test_embedding_without_a_pad_row_keeps_none() -> None:
    model = make_model("gpt_neox")  # its modules never look at pad_token_id
    prepare_tokens(model, make_tokenizer(), {"pad_token": "<new pad>"}).apply()
    assert model.config.pad_token_id is not None
    assert model.get_input_embeddings().padding_idx is None
