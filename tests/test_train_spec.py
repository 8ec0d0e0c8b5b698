"""The keys of a run: what is read, what is refused and in which words."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from longattn.plan import Plan
from longattn.train import TrainSpec

NEEDED = dict(model="src", text="text", length=64, steps=4, out="out")
PLAN = dict(rope={"rope_type": "yarn", "factor": 4.0}, tokens={"tokens": {"pad_token": "<p>", "extra": ["<a>", "<b>"]}})


def test_keys_of_plan_and_run_are_told_apart():
    spec = TrainSpec.from_dict({**NEEDED, **PLAN, "learning_rate": 1e-3})
    assert spec.plan == Plan(**PLAN) and spec.learning_rate == 1e-3 and spec.tokens == ["<p>", "<a>", "<b>"]
    assert TrainSpec.from_dict(NEEDED).plan is None and TrainSpec.from_dict(NEEDED).tokens == []
    assert TrainSpec.from_dict({**NEEDED, **PLAN, "new_tokens": ["<a>"]}).tokens == ["<a>"]


def test_what_is_written_reads_back(tmp_path):
    from longattn.plan_yaml import dump_yaml

    given = {**NEEDED, **PLAN, "recipe": "new-rows", "new_tokens": ["<a>"], "bf16": True, "eval_text": "t", "seed": 3}
    spec = TrainSpec.from_dict(given)
    assert spec.to_dict() == given
    (tmp_path / "run.yaml").write_text(dump_yaml(spec.to_dict()))
    assert TrainSpec.from_yaml(tmp_path / "run.yaml") == spec


def test_warmup_follows_the_steps():
    spec = TrainSpec.from_dict(NEEDED)
    warmups = [replace(spec, steps=steps).warmup_steps for steps in (4, 50, 1000)]
    assert warmups == [0, 5, 20] and replace(spec, warmup=4).warmup_steps == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(learningrate=1), "unknown key 'learningrate'; did you mean 'learning_rate'?; the keys are model, text"),
        (dict(ropes={}), "unknown key 'ropes'; did you mean 'rope'?"),
        (dict(steps="many"), "steps must be an int of at least 1, got 'many'"),
        (dict(steps=True), "steps must be an int of at least 1, got True"),
        (dict(length=1), "length must be an int of at least 2, got 1"),
        (dict(learning_rate=0), "learning_rate must be a number above 0, got 0"),
        (dict(bf16="yes"), "bf16 must be true or false, got 'yes'"),
        (dict(recipe="lora"), "recipe must be one of longlora, full, new-rows, got 'lora'"),
        (dict(out=""), "out must be a text, got ''"),
        (dict(new_tokens="<a>"), "new_tokens must be a list of texts, got '<a>'"),
        (dict(recipe="full", rank=4), "rank is for the recipe longlora, got it with full"),
        (dict(recipe="full", adapter="keep"), "adapter must be merge with the recipe full, which has none, got keep"),
        (dict(recipe="full", new_tokens=["<a>"]), "new_tokens must be left out with the recipe full"),
        (dict(recipe="new-rows"), "the recipe new-rows needs tokens in the plan, or new_tokens that the model has"),
        (dict(warmup=5), "train: warmup must be at most steps, 4, got 5"),
        (dict(eval_every=2), "eval_every needs eval_text, got none"),
        (dict(attention="windw:4"), "Plan: attention"),
    ],
)
def test_refusals_name_key_expected_and_got(change, message):
    with pytest.raises(ValueError) as caught:
        TrainSpec.from_dict({**NEEDED, **change})
    assert message in str(caught.value)


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match="train: text, out must be given; got the keys model, length, steps"):
        TrainSpec.from_dict({"model": "src", "length": 64, "steps": 4})
    with pytest.raises(TypeError, match="train: the run must be a mapping"):
        TrainSpec.from_dict([1])


def test_a_run_goes_on_as_it_began():
    spec = TrainSpec.from_dict({**NEEDED, **PLAN})
    spec.check_resumes(spec)
    replace(spec, resume=True, save_every=7, log_every=3).check_resumes(spec)
    for change, message in {
        ("seed", 1): "train: seed must be that of the run in out, 'the default', to go on with it, got 1",
        ("steps", 9): "train: steps must be that of the run in out, 4, to go on with it, got 9",
    }.items():
        with pytest.raises(ValueError, match=message):
            replace(spec, **dict([change])).check_resumes(spec)


def test_every_key_has_a_word_in_the_docstring():
    described = TrainSpec.__doc__.partition("Args:")[2].partition("Raises:")[0]
    missing = [key.name for key in fields(TrainSpec) if key.name not in described]
    assert missing == []
