"""The harness loads a changed model by the documented command, and scores what the model itself says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm_eval)")

import torch
from blocks import blocks, run_bash
from transformers import AutoModelForCausalLM, AutoTokenizer

from longattn.checkpoint import extend_checkpoint
from longattn.demo import MODEL_FOLDER
from longattn.demo.text import read_documents
from longattn.evaluate import encode, next_token_losses
from longattn.plan import Plan

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"


def test_documented_command_scores_a_changed_model(tmp_path):
    """Questions longer than the window: of two lines, which comes next; one is the text's own."""
    plan = Plan(rope={"rope_type": "yarn", "factor": 4.0}, attention="window:64+sinks:4")
    extend_checkpoint(MODEL_FOLDER, tmp_path / "longer", plan)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "longer", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "longer")
    texts = [doc.text[:440] for doc in read_documents(scored=True, min_chars=440)[:6]]
    questions = [
        {"text": text[:400].rstrip(), "choices": [text[400:440].strip(), other[400:440].strip()], "label": 0}
        for text, other in zip(texts, texts[1:] + texts[:1], strict=True)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions), encoding="utf-8")
    task = next(block.code for block in blocks(PAGE) if block.language == "yaml" and "task: recall" in block.code)
    (tmp_path / "recall.yaml").write_text(task, encoding="utf-8")
    command = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("python -c"))
    run_bash(f"export HF_DATASETS_CACHE=cache; {command} --log_samples", tmp_path)

    (results,) = tmp_path.rglob("*lm-eval*.json")
    (samples,) = tmp_path.rglob("samples_recall*.jsonl")
    right = 0
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        said = [float(response[0][0]) for response in sample["resps"]]
        expected = []
        for choice in sample["doc"]["choices"]:
            context, ids = encode(tokenizer, sample["doc"]["text"]), encode(tokenizer, f" {choice}")
            losses = next_token_losses(model, torch.tensor([[*context, *ids]]), len(ids))
            expected.append(-float(losses.sum()))
        assert said == pytest.approx(expected, rel=1e-4)
        right += expected[0] > expected[1]
    accuracy = json.loads(results.read_text())["results"]["recall"]["acc,none"]
    assert accuracy == pytest.approx(right / len(questions))
    assert re.search(r"longattn", (tmp_path / "longer" / "config.json").read_text())
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
