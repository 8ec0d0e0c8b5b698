"""A model whose record has patterns warns once where it is given an attention without them."""

import warnings

import pytest
from hf_models import build
from transformers import AutoModelForCausalLM

import longattn


def words_of(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        action()
    return [str(warning.message) for warning in caught if "attn_implementation" in str(warning.message)]


@pytest.fixture
def extended():
    model = build("llama")
    longattn.extend(model, None, longattn.Plan(attention="window:8"))
    return model


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_loading_without_the_patterns_warns_once(extended, tmp_path, name):
    extended.save_pretrained(tmp_path)
    (words,) = words_of(lambda: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name))
    assert words.startswith(f"longattn: attn_implementation '{name}' leaves out the attention patterns")


def test_loading_with_the_patterns_does_not_warn(extended, tmp_path):
    extended.save_pretrained(tmp_path)
    assert words_of(lambda: AutoModelForCausalLM.from_pretrained(tmp_path)) == []


def test_switching_warns_and_restoring_does_not(extended):
    (words,) = words_of(lambda: extended.set_attn_implementation("sdpa"))
    assert words.startswith("longattn: attn_implementation 'sdpa' leaves out")
    assert words_of(lambda: extended.set_attn_implementation("longattn")) == []
    assert words_of(lambda: longattn.restore(extended)) == []


def test_a_plan_without_patterns_does_not_warn():
    model = build("llama")
    longattn.extend(model, None, longattn.Plan(rope={"rope_type": "yarn", "factor": 4.0}))
    assert words_of(lambda: model.set_attn_implementation("eager")) == []
