"""`restore` puts a tokenizer's length back: from memory, from disk, after several plans, or not if it isn't known."""

from __future__ import annotations

import pytest
from checkpoints import edit_json, write_checkpoint
from hf_models import build, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from longattn.checkpoint import extend_checkpoint
from longattn.hf.lengths import UNLIMITED
from longattn.plan import Plan
from longattn.report import Change
from longattn.surgery import extend, restore

WHAT = "tokenizer.model_max_length"
LONGER = Plan(rope={"rope_type": "yarn", "factor": 4.0})
FURTHER = Plan(context=512)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def test_length_goes_back_after_plans_and_reloads(tmp_path):
    model, tokenizer = build("llama"), build_tokenizer()
    tokenizer.model_max_length = 48  # not the model's
    for plan in (LONGER, Plan(attention="window:8"), FURTHER):
        extend(model, tokenizer, plan)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    for changed, its in ((model, tokenizer), load(tmp_path)):
        assert its.model_max_length == 512
        report = restore(changed, its)
        assert its.model_max_length == 48 and changed.config.max_position_embeddings == 64
        assert Change(WHAT, 512, 48) in report.changes and report.notes == []


@pytest.mark.parametrize("tokens", [None, {"tokens": ["<a>"]}])
@pytest.mark.parametrize("length", [48, None])
def test_length_goes_back_on_a_checkpoint(length, tokens, tmp_path):
    src = write_checkpoint(tmp_path / "src")
    edit_json(src / "tokenizer_config.json", model_max_length=UNLIMITED if length is None else length)
    plan = Plan(rope=LONGER.rope, tokens=tokens)
    report = extend_checkpoint(src, tmp_path / "once", plan)
    assert Change(WHAT, length, 256) in report.changes
    extend_checkpoint(tmp_path / "once", tmp_path / "twice", FURTHER)
    for folder, longest in (("once", 256), ("twice", 512)):
        model, tokenizer = load(tmp_path / folder)
        assert Change(WHAT, longest, length) in restore(model, tokenizer).changes
        tokenizer.save_pretrained(tmp_path / "restored")
        for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "restored")):
            assert one.model_max_length == (UNLIMITED if length is None else length)


def test_length_is_noted_where_no_tokenizer_is_given():
    model, tokenizer = build("llama"), build_tokenizer()
    extend(model, tokenizer, LONGER)
    assert restore(model).notes == ["the tokenizer, which was not given, had model_max_length 64 before the first plan"]
    assert tokenizer.model_max_length == 256


def test_length_that_is_not_known_stays():
    model, tokenizer = build("llama"), build_tokenizer()
    extend(model, tokenizer, LONGER)
    del model.config.longattn["original_tokenizer"]  # as earlier records were
    extend(model, tokenizer, FURTHER)
    report = restore(model, tokenizer)
    assert tokenizer.model_max_length == 512 and report.notes == []
    assert WHAT not in [change.what for change in report.changes]


def test_length_is_kept_where_an_earlier_plan_had_no_tokenizer():
    model, tokenizer = build("llama"), build_tokenizer()
    extend(model, None, LONGER)
    extend(model, tokenizer, FURTHER)
    restore(model, tokenizer)
    assert tokenizer.model_max_length == 64


def test_tokenizer_without_a_limit_stays_so():
    model, tokenizer = build("llama"), build_tokenizer()
    tokenizer.model_max_length = UNLIMITED
    for change in (lambda: extend(model, tokenizer, LONGER), lambda: restore(model, tokenizer)):
        assert WHAT not in [change.what for change in change().changes]
        assert tokenizer.model_max_length == UNLIMITED


def test_failing_restore_leaves_the_length(monkeypatch):
    model, tokenizer = build("llama"), build_tokenizer()
    extend(model, tokenizer, Plan(rope=LONGER.rope, attention="window:8"))
    with monkeypatch.context() as patch:
        patch.setattr("longattn.surgery._set_implementation", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            restore(model, tokenizer)
    assert tokenizer.model_max_length == 256
    restore(model, tokenizer)
    assert tokenizer.model_max_length == 64


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="restore: tokenizer must be a transformers tokenizer, got str"):
        restore(build("llama"), "tokenizer")
