"""TRL's SFTTrainer on extended models: both ways of packing, padding-free rows, adapters."""

from __future__ import annotations

import random

import pytest
import torch
from datasets import Dataset
from hf_models import VOCAB
from peft import LoraConfig
from training_helpers import NEW, SERVING, TRAINING, each_layer, extended, patterns_called
from trl import SFTConfig, SFTTrainer

from longattn.hf.attention import calls_seen
from longattn.train import longlora_config, merge

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS = 4
TEXTS = 40
LENGTH = 32
RAGGED = {
    "packed": {"packing": True},  # whole documents, best fit first
    "packed, split": {"packing": True, "packing_strategy": "bfd_split"},
    "padding-free": {"padding_free": True, "max_length": None},
}
WHOLE = {"packed, wrapped": {"packing": True, "packing_strategy": "wrapped"}, "padded": {}}


def texts() -> Dataset:
    """Each text counts on from a word, so that there is something to learn; new tokens among the words."""
    draw = random.Random(0)
    rows = []
    for row in range(TEXTS):
        start, words = draw.randrange(30), 4 + row % 13
        rows.append({"text": " ".join([*(f"w{start + word}" for word in range(words)), NEW[row % 2], f"w{start}"])})
    return Dataset.from_list(rows)


def trainer(folder, peft_config: LoraConfig | None = None, **more) -> SFTTrainer:
    model, tokenizer, _ = extended(initializer_range=0.1)
    data = texts()
    config = SFTConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=STEPS,
        save_strategy="no",
        logging_steps=1,
        learning_rate=2e-2,
        report_to=[],
        disable_tqdm=True,
        **{"max_length": LENGTH, **more},
    )
    return SFTTrainer(
        model,
        args=config,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def losses(run: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("way", [*RAGGED, *WHOLE])
def test_sft_trains_in_the_training_pattern_and_evaluates_in_the_serving_one(tmp_path, way):
    run = trainer(tmp_path, **{**RAGGED, **WHOLE}[way])
    assert run.model.config._attn_implementation == "longattn"
    batch = next(iter(run.get_train_dataloader()))
    assert ("attention_mask" in batch) == (way in WHOLE)
    assert ("position_ids" in batch) == (way in RAGGED)
    with calls_seen() as calls:
        run.train()
    counts = patterns_called(calls)
    trained, evaluated = each_layer(run.model, TRAINING), each_layer(run.model, SERVING)
    assert set(counts) == {*trained, *evaluated}
    # gradient checkpointing, on by default, runs each layer twice
    assert all(counts[call] == STEPS * 2 * 2 for call in trained)
    assert losses(run)[-1] < losses(run)[0]


def test_sft_trains_alike_with_and_without_padding(tmp_path):
    padded = trainer(tmp_path)
    padded.train()
    free = trainer(tmp_path, **RAGGED["padding-free"])
    free.train()
    assert losses(free) == pytest.approx(losses(padded), rel=1e-4)
    assert free.evaluate()["eval_loss"] == pytest.approx(padded.evaluate()["eval_loss"], rel=1e-4)


def test_sft_trains_adapters_and_new_rows(tmp_path):
    _, _, new_ids = extended()
    # SFTTrainer takes weight and bias out of the head, which has no bias to give when PEFT trains some of its rows
    rows = LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": new_ids}, modules_to_save=["lm_head"]
    )
    run = trainer(tmp_path, rows, packing=True)
    base = run.model.get_base_model()
    before = base.get_input_embeddings().weight.detach().clone()
    with calls_seen() as calls:
        run.train()
    assert set(patterns_called(calls)) == {*each_layer(base, TRAINING), *each_layer(base, SERVING)}
    assert losses(run)[-1] < losses(run)[0]
    after = run.model.merge_and_unload().get_input_embeddings().weight
    assert torch.equal(after[:VOCAB], before[:VOCAB])
    assert not torch.equal(after[VOCAB:], before[VOCAB:])


def test_sft_takes_the_longlora_recipe(tmp_path):
    base, *_ = extended(initializer_range=0.1)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    run = trainer(tmp_path, longlora_config(base, rank=4), packing=True)
    with calls_seen() as calls:
        run.train()
    model = run.model.get_base_model()
    assert set(patterns_called(calls)) == {*each_layer(model, TRAINING), *each_layer(model, SERVING)}
    assert losses(run)[-1] < losses(run)[0]
    after = merge(run.model).state_dict()
    changed = {name for name, old in before.items() if not torch.equal(after[name], old)}
    assert changed == {name for name in before if "self_attn" in name or "norm" in name or "embed_tokens" in name}
