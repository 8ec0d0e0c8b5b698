"""Plans: the same from Python, YAML and a dict; what they refuse, and with which words."""

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.pattern import Pattern
from longattn.plan import Plan

YAML = """
rope:
  rope_type: yarn
  factor: 8.0
  rope_theta: 1e6
context: 32768
attention: 3 x window:4096+sinks:4, 1 x full
train_attention: [group:2048+shift, full]
tokens:
  tokens: ["<tool>"]
  init: mean
"""
PLAN = Plan(
    rope={"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e6},
    context=32768,
    attention="3 x window:4096+sinks:4, 1 x full",
    train_attention=["group:2048+shift", "full"],
    tokens={"tokens": ["<tool>"], "init": "mean"},
)


def from_yaml(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return Plan.from_yaml(path)


def test_plan_from_yaml_equals_python(tmp_path):
    assert from_yaml(tmp_path, YAML) == PLAN


def test_plan_survives_its_json_form():
    assert Plan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN


def test_plan_to_dict_holds_given_parts_only():
    assert Plan(attention="full").to_dict() == {"attention": "full"}


def test_plan_records_tensor_and_callable_as_words():
    def init(token, rows):
        return rows[0]

    tokens = {"tokens": ["<a>"], "init": torch.zeros(1, 4), "output_init": init}
    assert Plan(tokens=tokens).to_dict() == {"tokens": {"tokens": ["<a>"], "init": "tensor", "output_init": "callable"}}


def test_plan_keeps_no_reference_to_its_arguments():
    rope, layers, tokens = {"rope_type": "linear", "factor": 2.0}, ["full"], {"tokens": ["<a>"]}
    plan = Plan(rope=rope, attention=layers, tokens=tokens)
    rope["factor"] = 3.0
    layers.append("window:4")
    tokens["tokens"].append("<b>")
    assert plan == Plan(rope={"rope_type": "linear", "factor": 2.0}, attention=["full"], tokens={"tokens": ["<a>"]})


def test_plan_reads_older_name_of_rope_type():
    assert Plan(rope={"type": "yarn", "factor": 2.0}) == Plan(rope={"rope_type": "yarn", "factor": 2.0})


def test_patterns_are_cycled_and_training_follows_serving():
    plan = Plan(attention="2 x window:8, full")
    expected = [Pattern("window", 8), Pattern("window", 8), Pattern("full"), Pattern("window", 8)]
    assert plan.attention_patterns(4) == expected
    assert plan.train_patterns(4) == expected


def test_patterns_for_training_leave_serving_alone():
    plan = Plan(train_attention="group:8+shift")
    assert plan.attention_patterns(2) is None
    assert plan.train_patterns(2) == [Pattern("group", 8, 4)] * 2


def test_patterns_of_a_list_must_be_one_a_layer():
    with pytest.raises(ValueError, match="one pattern a layer, 4 in all, got 2"):
        Plan(attention=["full", "window:8"]).attention_patterns(4)


def test_patterns_are_accepted_as_objects():
    assert Plan(attention=[Pattern("window", 8)]) == Plan(attention=["window:8"])
    assert Plan(attention=Pattern("full")) == Plan(attention="full")


REFUSED = [
    ({}, ValueError, "give at least one of rope, context, attention, train_attention, tokens"),
    ({"atention": "full"}, ValueError, "unknown key 'atention'; did you mean 'attention'"),
    ({"rope": "yarn"}, TypeError, "rope must be a mapping"),
    ({"rope": {}}, ValueError, "rope must name at least one key"),
    ({"rope": {"rope_type": "yarn", "factr": 8}}, ValueError, "unknown key 'factr'; did you mean 'factor'"),
    ({"rope": {"rope_type": "yran", "factor": 8}}, ValueError, "did you mean 'yarn'"),
    ({"rope": {"rope_type": "yarn", "type": "linear"}}, ValueError, "which differ"),
    ({"rope": {"rope_type": "linear", "factor": 2, "beta_fast": 32}}, ValueError, "'linear' has no key 'beta_fast'"),
    ({"rope": {"rope_type": "linear", "factor": math.nan}}, ValueError, "finite number of at least 1, got nan"),
    ({"rope": {"rope_type": "linear", "factor": -2.0}}, ValueError, "finite number of at least 1, got -2.0"),
    ({"rope": {"rope_type": "linear", "factor": 0.5}}, ValueError, "finite number of at least 1, got 0.5"),
    ({"rope": {"rope_type": "linear", "factor": "8"}}, ValueError, "finite number of at least 1, got '8'"),
    ({"rope": {"rope_type": "linear", "factor": None}}, ValueError, "must have a value"),
    ({"rope": {"rope_theta": math.inf}}, ValueError, "'rope_theta'.* must be a finite number"),
    ({"rope": {"original_max_position_embeddings": 4096.0}}, TypeError, "must be an int"),
    ({"rope": {"partial_rotary_factor": 1.5}}, ValueError, "at most 1, got 1.5"),
    ({"rope": {"long_factor": [1.0, -1.0]}}, ValueError, r"\['long_factor'\]\[1\] must be a finite number above 0"),
    ({"rope": {"full_attention": {"factor": 2}, "sliding_attention": 3}}, TypeError, "must be a mapping"),
    ({"context": 32768.0}, TypeError, "context must be an int"),
    ({"context": True}, TypeError, "context must be an int"),
    ({"context": 0}, ValueError, "at least 1 token, got 0"),
    ({"attention": 8}, TypeError, "attention must be a text"),
    ({"attention": []}, ValueError, "attention: the list must hold one pattern a layer"),
    ({"attention": "window:0"}, ValueError, "attention: .*at least 1 token, got 0"),
    ({"attention": "window:-4"}, ValueError, "attention: .*whole number >= 0, got '-4'"),
    ({"attention": ["full", "windo:4"]}, ValueError, "attention: .*got 'windo:4'"),
    ({"train_attention": "group:8+shift:8"}, ValueError, "train_attention: .*shift must be below"),
    ({"tokens": ["<a>"]}, TypeError, "tokens must be a mapping"),
    ({"tokens": {"tokens": []}}, ValueError, "at least one token"),
    ({"tokens": {"tokens": "<a>"}}, TypeError, "must be a list, or a mapping from role to token"),
    ({"tokens": {"token": ["<a>"]}}, ValueError, "unknown key 'token'; did you mean 'tokens'"),
    ({"tokens": {"tokens": ["<a>"], "special": "yes"}}, TypeError, "true or false"),
    ({"tokens": {"tokens": ["<a>"], "pad_to_multiple_of": 0}}, ValueError, "at least 1, got 0"),
]


@pytest.mark.parametrize(("mapping", "error", "message"), REFUSED)
def test_plan_refuses_with_reason(mapping, error, message):
    with pytest.raises(error, match=message) as caught:
        Plan.from_dict(mapping)
    assert str(caught.value).startswith("Plan: ")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("context: 8\ncontext: 16\n", ValueError, "the key 'context' comes twice"),
        ("rope: {factor: 2\n", ValueError, r"plan\.yaml, line \d+"),
        ("- full\n", TypeError, "a plan must be a mapping"),
        ("", TypeError, "a plan must be a mapping"),
        ("rope: !!python/object/apply:os.getcwd []\n", ValueError, "could not determine a constructor"),
    ],
)
def test_plan_refuses_yaml_with_reason(tmp_path, text, error, message):
    with pytest.raises(error, match=message) as caught:
        from_yaml(tmp_path, text)
    assert "\n" not in str(caught.value)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
WORDS = st.sampled_from(["rope", "context", "attention", "tokens", "rope_type", "factor", "yarn", "window:8", "full"])
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES)
def test_plan_of_anything_is_made_or_refused(value):
    try:
        plan = Plan.from_dict(value)
    except (TypeError, ValueError):
        return
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@given(st.dictionaries(st.sampled_from(["rope", "context", "attention", "train_attention", "tokens"]), VALUES))
def test_plan_of_any_values_is_made_or_refused(mapping):
    test_plan_of_anything_is_made_or_refused.hypothesis.inner_test(mapping)


def test_numbers_of_other_libraries_become_numbers_that_json_holds():
    rope = {
        "rope_type": "longrope",
        "short_factor": (Fraction(1, 2),),
        "long_factor": [Fraction(2)],
        "factor": Fraction(4),
    }
    stored = {**rope, "short_factor": [0.5], "long_factor": [2.0], "factor": 4.0}
    assert json.loads(json.dumps(dict(Plan(rope=rope).rope))) == stored
