"""Transformers models over gloo ranks: loss and gradients of a step are those of one process."""

from __future__ import annotations

import distributed_models as models
import pytest

STEPS = {
    "llama": dict(),
    "uneven length": dict(length=45),
    "documents": dict(documents=[0, 7, 29, 45], length=45),
    "checkpointing": dict(checkpointing="not reentrant"),
    "reentrant checkpointing": dict(checkpointing="reentrant"),
    "ulysses": dict(full="ulysses"),
    "ulysses with documents": dict(full="ulysses", documents=[0, 7, 29, 45], length=45),
    "adapters": dict(lora=True),
    "parallelize_module": dict(by_style=True),
    "sink logits": dict(family="gpt_oss"),
    "sink logits, ulysses": dict(family="gpt_oss", full="ulysses"),
    "soft cap": dict(family="gemma2"),
    "partial rope": dict(family="gpt_neox"),
    "own windows": dict(family="qwen2"),
}


@pytest.mark.parametrize("name", STEPS)
def test_step_over_two_ranks_is_that_of_one(gloo, name):
    found = gloo.run(2, models.compare, **STEPS[name])[0]
    low = name in ("soft cap", "sink logits", "sink logits, ulysses")
    assert found.pop("loss") < 1e-6
    assert max(found.values()) < (1e-5 if low else 1e-12), {k: v for k, v in found.items() if v > 1e-12}


@pytest.mark.parametrize("lora", [False, True])
def test_step_over_dp_and_cp_is_that_of_one(gloo, lora):
    found = gloo.run(4, models.compare, dp=2, length=45, checkpointing="not reentrant", lora=lora)[0]
    assert found.pop("loss") < 1e-6
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("full", ["gather", "ulysses"])
def test_compiled_step_is_that_of_one(gloo, full):
    found = gloo.run(2, models.compare, compiled=True, full=full)[0]
    assert found.pop("loss") < 1e-6
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("stock", "must be an attention module of a model that longattn.extend gave patterns"),
        ("other batches", "all ranks must be given the same input_ids"),
        ("left padding", "attention_mask must be ones and then zeros"),
        ("packed rows", "packed documents need one row"),
        ("other tensors", "tensors in batch must be input_ids, labels, shift_labels"),
        ("no positions", "position_ids must be those of the whole sequence, 24 to 47 on this rank, got 0 to 23"),
        ("zig-zag", "position_ids must be those of the whole sequence"),
        ("mask", "takes no attention_mask"),
        ("decoding", "attended to in one call"),
    ],
)
def test_what_is_wrong_is_refused_on_every_rank(gloo, how, text):
    assert all(text in heard for heard in gloo.run(2, models.refusals, how))


def test_released_model_attends_on_one_rank(gloo):
    assert all(gloo.run(2, models.released))


PROMPTS = {
    "all kinds": ("llama", "window:9+sinks:2, group:6+shift, full, window:30", 45),
    "sinks that meet the window": ("llama", "window:9+sinks:40, group:4+sinks:3", 45),
    "shorter than its windows": ("llama", "window:90+sinks:2, group:64", 13),
    "own windows": ("qwen2", None, 45),
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize(("ranks", "to"), [(2, 0), (3, 2)])
def test_prompt_read_over_ranks_is_decoded_on_one(gloo, name, ranks, to):
    found = gloo.run(ranks, models.decoded, *PROMPTS[name], to)[to]
    assert found["logits"] < 1e-12 and found["same tokens"], found
    assert name != "all kinds" or found["held"] == [10, 9, 45, 29]


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("not parallel", "model must have been given to parallelize with this group"),
        ("training", "model must be in eval mode"),
        ("another prompt", "all ranks must be given the same input_ids"),
        ("to", "to must be one of the group's ranks, 0 to 1, got 5"),
    ],
)
def test_wrong_prompts_are_refused_on_every_rank(gloo, how, text):
    heard = gloo.run(2, models.prefill_refusal, how)
    assert all(text in one for one in heard), heard


def test_copies_of_a_model_share_its_group(gloo):
    assert all(gloo.run(2, models.deep_copy_shares_its_group))


def test_compiled_models_without_positions_are_refused_on_every_rank(gloo):
    heard = gloo.run(2, models.compiled_without_positions)
    assert all("position_ids must be those of the whole sequence" in one for one in heard), heard
