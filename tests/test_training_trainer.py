"""transformers' Trainer on extended models: patterns in training and evaluation, checkpoints, resuming, packing."""

from __future__ import annotations

import pytest
import torch
from hf_models import build
from training_helpers import PLAN, SERVING, TRAINING, each_layer, extended, patterns_called
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from longattn.hf.attention import calls_seen
from longattn.surgery import restore

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS = 4
ACCUMULATED = 2
TEXTS = 32
EVALUATED = 4


def texts(new_ids: list[int]) -> list[dict[str, list[int]]]:
    """Each text counts on from a word, so that there is something to learn; new tokens among the words."""
    starts = torch.randint(3, 30, (TEXTS,), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        {"input_ids": [*range(start, start + 5 + row % 9), new_ids[row % 2], start]} for row, start in enumerate(starts)
    ]


def arguments(folder, **more) -> TrainingArguments:
    return TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=ACCUMULATED,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        logging_steps=1,
        learning_rate=2e-2,
        report_to=[],
        disable_tqdm=True,
        **more,
    )


def trainer(folder, collator: str = "flattened", **more) -> Trainer:
    model, tokenizer, new_ids = extended(initializer_range=0.1, num_hidden_layers=2)
    tokenizer.pad_token = "</s>"
    if collator == "padded":
        collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    else:
        collate = DataCollatorWithFlattening(return_flash_attn_kwargs=collator == "flattened for flash attention")
    return Trainer(
        model,
        arguments(folder, **more),
        data_collator=collate,
        train_dataset=texts(new_ids),
        eval_dataset=texts(new_ids)[:EVALUATED],
        processing_class=tokenizer,
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_in_the_training_pattern_and_evaluates_in_the_serving_one(tmp_path, checkpointing):
    run = trainer(tmp_path, gradient_checkpointing=checkpointing)
    with calls_seen() as calls:
        run.train()
    evaluations = STEPS // 2 * EVALUATED // 2
    passes = STEPS * ACCUMULATED * (2 if checkpointing else 1)
    expected = each_layer(run.model, TRAINING, passes) + each_layer(run.model, SERVING, evaluations)
    assert patterns_called(calls) == expected
    assert losses(run)[-1] < losses(run)[0]


def test_packed_and_padded_batches_train_alike(tmp_path):
    runs = {name: trainer(tmp_path, name) for name in ("padded", "flattened", "flattened for flash attention")}
    for run in runs.values():
        run.train()
    evaluated = {name: run.evaluate()["eval_loss"] for name, run in runs.items()}
    for name, run in runs.items():
        assert losses(run) == pytest.approx(losses(runs["padded"]), rel=1e-4), name
        assert evaluated[name] == pytest.approx(evaluated["padded"], rel=1e-4), name


def test_trainer_checkpoints_load_and_resume(tmp_path):
    run = trainer(tmp_path)
    run.train()
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    trained = run.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in again.model.state_dict().items())

    folder = tmp_path / f"checkpoint-{STEPS}"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w1 w2 <a> w3 <b>", return_tensors="pt")["input_ids"]
    assert PLAN.tokens["tokens"] == tokenizer.convert_ids_to_tokens(ids[0, [2, 4]].tolist())
    with torch.no_grad(), calls_seen() as calls:
        assert torch.equal(model(ids).logits, run.model.eval()(ids).logits)
        model.train()(ids)
    assert patterns_called(calls) == each_layer(model, SERVING, 2) + each_layer(model, TRAINING)
    restore(model)
    stock = build("llama")
    assert model.config.rope_parameters == stock.config.rope_parameters
    assert model.config.max_position_embeddings == stock.config.max_position_embeddings


def test_trainer_compiles_the_model(tmp_path):
    plain = trainer(tmp_path)
    plain.train()
    torch._dynamo.reset()
    compiled = trainer(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
