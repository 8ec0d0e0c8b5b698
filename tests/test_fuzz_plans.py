"""Any plan, plan text, flag, header or config: what was asked for, or an error of a documented type, at once."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import yaml
from checkpoints import read_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from longattn.checkpoint import preview_checkpoint
from longattn.cli import app
from longattn.pattern import Pattern, parse_pattern, parse_patterns
from longattn.plan import Plan
from longattn.plan_yaml import load_yaml
from longattn.shards import Shard

SETTINGS = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FEWER = settings(SETTINGS, max_examples=60)

SIZES = st.integers(1, 10**15) | st.integers(1, 9)


@st.composite
def patterns(draw):
    kind = draw(st.sampled_from(["full", "window", "group"]))
    if kind == "full":
        return Pattern("full")
    size = draw(SIZES)
    shift = draw(st.integers(0, size - 1)) if kind == "group" else 0
    return Pattern(kind, size, shift, draw(st.integers(0, 9)))


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from([10**400, 5e-324, 2**63]),
)
WORDS = st.sampled_from(
    [
        *["rope", "context", "attention", "train_attention", "tokens", "special", "init", "output_init", "mean"],
        *[
            "rope_type",
            "type",
            "factor",
            "yarn",
            "linear",
            "longrope",
            "rope_theta",
            "short_factor",
            "window:8",
            "full",
        ],
        *[
            "full_attention",
            "sliding_attention",
            "group:8+shift",
            "pad_to_multiple_of",
            "copy:</s>",
            "2 x full, group:4",
        ],
    ]
)
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["linear", "yarn", "ntk", "dynamic", "by-parts", "llama3", "longrope", "default"]),
        "factor": st.floats(1, 64) | st.integers(1, 64) | SCALARS,
        "rope_theta": st.floats(2, 1e7) | SCALARS,
        "beta_fast": st.floats(8, 64) | SCALARS,
        "original_max_position_embeddings": st.integers(16, 64) | SCALARS,
        "short_factor": st.lists(st.floats(0.5, 2), min_size=4, max_size=4) | VALUES,
    },
)
ATTENTION = st.one_of(patterns().map(str), st.lists(patterns().map(str), max_size=5), VALUES)
TOKENS = st.fixed_dictionaries(
    {"tokens": st.lists(st.text(max_size=6), min_size=1, max_size=3) | VALUES},
    optional={"init": st.sampled_from(["mean", "subwords", "copy:w3"]) | VALUES, "special": st.booleans() | SCALARS},
)
PLANS = st.fixed_dictionaries(
    {},
    optional={
        "rope": ROPE | VALUES,
        "context": st.integers(1, 4096) | SCALARS,
        "attention": ATTENTION,
        "train_attention": ATTENTION,
        "tokens": TOKENS | VALUES,
    },
)


@SETTINGS
@given(PLANS | VALUES)
def test_plan_is_made_and_restored_or_refused(mapping):
    try:
        plan = Plan.from_dict(mapping)
    except (TypeError, ValueError) as error:
        assert str(error).startswith("Plan: "), repr(error)
        return
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_plans_with_tensors_compare():
    rows = torch.randn(2, 8)
    plans = [Plan(tokens={"tokens": ["a", "b"], "init": init}) for init in (rows, rows.clone(), rows + 1, "mean")]
    assert [plan == plans[0] for plan in plans] == [True, True, False, False]
    assert plans[0] != "plan"


TAGS = [
    "!!bool",
    "!!int",
    "!!float",
    "!!timestamp",
    "!!binary",
    "!!set",
    "!!omap",
    "!!python/name:os.system",
    "!own",
    "&a",
]
YAML_PIECES = st.lists(
    st.one_of(
        WORDS,
        st.sampled_from(
            [": ", "\n", "\n  ", "- ", "[", "]", "{", "}", ", ", "*a", "<<: ", "---\n", "? ", "|", "'", '"']
        ),
        st.sampled_from([f"{tag} " for tag in TAGS]),
        st.sampled_from(
            ["1e6", "0x", "0b2", "1:60", ".nan", "-.inf", "2020-13-45", "~", "8", "\t", "\0", "é", "9" * 5000]
        ),
    ),
    max_size=14,
)


@SETTINGS
@given(YAML_PIECES.map("".join) | st.text(max_size=40))
def test_yaml_text_is_read_or_refused(text):
    try:
        load_yaml(text, "plan.yaml")
    except ValueError as error:
        assert str(error).startswith("Plan: plan.yaml"), repr(error)
        assert "\n" not in str(error)


@SETTINGS
@given(PLANS)
def test_yaml_holds_every_plan(tmp_path, mapping):
    try:
        plan = Plan.from_dict(mapping)
    except (TypeError, ValueError):
        return
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan.to_dict(), allow_unicode=True), encoding="utf-8")
    assert Plan.from_yaml(tmp_path / "plan.yaml") == plan


@pytest.mark.parametrize(
    "text", ["a: &a [1, 1]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*a, *a]\n" for i in range(20))]
)
def test_yaml_that_stands_for_more_than_it_holds_is_refused(text):
    with pytest.raises(ValueError, match="aliases are not read"):
        load_yaml(text, "plan.yaml")


@SETTINGS
@given(patterns())
def test_pattern_is_read_as_it_is_written(pattern):
    assert parse_pattern(str(pattern)) == pattern


PATTERN_PIECES = [
    "full",
    "window",
    "group",
    ":",
    "+",
    "shift",
    "sinks",
    "8",
    "0",
    "-1",
    " x ",
    "*",
    ",",
    " ",
    "1e3",
    "٣",
    "9" * 40,
]


@SETTINGS
@given(st.lists(st.sampled_from(PATTERN_PIECES), max_size=9).map("".join) | st.text(max_size=20), st.integers(1, 9))
def test_pattern_text_is_read_or_refused(text, layers):
    try:
        found = parse_patterns(text, layers)
    except ValueError:
        return
    assert len(found) == layers
    assert parse_patterns([str(pattern) for pattern in found], layers) == found


@pytest.mark.parametrize(
    ("text", "layers"),
    [("1000000000000 x full, window:8", 4), ("full" + " " * 10**6 + "?", 4), ("9" * 10**6 + " x full", 4)],
)
def test_pattern_text_of_any_size_is_read_at_once(text, layers):
    try:
        assert parse_patterns(text, layers) == [Pattern("full")] * layers
    except ValueError:
        assert not text.startswith("1000")


FLAGS = {
    "--rope-type": st.sampled_from(["linear", "yarn", "ntk", "llama3", "longrope", "", "x"]),
    "--factor": st.sampled_from(["2", "4.5", "nan", "-inf", "1e300", "0", "x", ""]),
    "--rope": st.sampled_from(["rope_theta=1e6", "beta_fast=9", "a.b=2", "a.b.c=", "=", "factor", "a={", "x=!!bool 3"]),
    "--context": st.sampled_from(["128", "0", "-1", "1e3", "99999999999999999999", "9" * 5000]),
    "--attention": st.sampled_from(["window:8", "2 x group:8+shift, full", "[full, full, full, full]", "[", "", ","]),
    "--train-attention": st.sampled_from(["group:8", "full", "group:65", "window:0", "[full]"]),
    "--add-token": st.sampled_from(["<tool>", "w3", "pad_token=<p>", "x_token=", "x_token=<y>", "", " "]),
    "--token-init": st.sampled_from(["mean", "subwords", "copy:w3", "<tool>=w3 w4", "", "x"]),
    "--pad-to-multiple-of": st.sampled_from(["8", "0", "-8", "x", "99999999999"]),
}
ARGUMENTS = st.lists(
    st.sampled_from(sorted(FLAGS)).flatmap(lambda flag: FLAGS[flag].map(lambda value: [flag, value])), max_size=4
).map(lambda pairs: sum(pairs, []))


@FEWER
@given(ARGUMENTS)
def test_flags_make_a_preview_or_an_error(src, arguments):
    result = CliRunner().invoke(app, ["extend", str(src), "--dry-run", *arguments])
    assert result.exit_code in (0, 2), repr(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert (result.stdout == "") is (result.exit_code == 2)


@SETTINGS
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3
    )
)
def test_header_with_other_bytes_is_read_or_refused(src, tmp_path, edits):
    """A shard that is still read describes all of its bytes, without gaps."""
    content = bytearray(sorted(src.glob("*.safetensors"))[0].read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for place, new in edits:
        at = int(place * header)
        content[at : at + len(new)] = new
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        shard = Shard.open(path)
    except ValueError as error:
        assert re.match("extend: model.safetensors is (corrupt|cut off)", str(error)), repr(error)
        return
    assert len(shard.header) + sum(tensor.num_bytes for tensor in shard.tensors) == len(content)


@FEWER
@given(data=st.data())
def test_config_of_any_values_is_extended_or_refused(src, tmp_path, data):
    fields = read_json(src / "config.json")
    for key in data.draw(st.sets(st.sampled_from(sorted(fields)), min_size=1, max_size=2)):
        fields[key] = data.draw(VALUES | st.sampled_from([0, -1, 10**6, 10**9, 2**31, 10**15, 2**63, 1.5]))
    folder = tmp_path / "other"
    shutil.copytree(src, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    try:
        preview_checkpoint(folder, Plan(rope={"rope_type": "yarn", "factor": 4.0}))
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        assert not isinstance(error, (RecursionError, NotImplementedError)), repr(error)
