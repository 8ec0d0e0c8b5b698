"""Perplexity: which tokens are scored, with how much text in sight, and that their logits never exist all at once."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

pytest.importorskip("transformers")

import torch
from hf_models import build, build_tokenizer, tokens
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import longattn
from longattn.demo import MODEL_FOLDER
from longattn.demo.text import read_documents
from longattn.evaluate import (
    Score,
    ScoringWindow,
    SlidingScore,
    encode,
    greedy,
    leading_tokens,
    next_token_losses,
    score_last,
    score_sliding,
    scoring_windows,
    spread_ends,
    token_loss,
    windows_at,
)
from longattn.text import Document, load_documents


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)


class Pairs:
    """A tokenizer of two characters a token."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [hash(text[i : i + 2]) % 1000 for i in range(0, len(text), 2)]}


def log_p(model, ids):
    """Of each token but the first, by the definition, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


# families whose head does more than multiply, or whose layers return more than hidden states
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "mixtral", "gpt_neox", "gpt_oss"])
def test_losses_are_those_of_the_models_own_logits(family):
    model, ids = build(family, dtype=torch.float32), tokens(2, 40)
    with torch.no_grad():
        expected = -model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    for keep, max_logits in ((None, 2 * 64 * 7), (9, 1), (9, 1 << 25)):
        losses = next_token_losses(model, ids, keep, max_logits=max_logits)
        torch.testing.assert_close(losses, expected[:, -(keep or 39) :], rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(model.base_model)


def test_head_sees_few_positions_at_a_time(model):
    rows = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    try:
        next_token_losses(model, tokens(1, 600), max_logits=257 * 100)
    finally:
        hook.remove()
    assert max(rows) == 100 and sum(rows) == 1 + 599


def test_losses_are_of_the_serving_pattern_and_the_mode_stays(model):
    changed = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
    longattn.extend(changed, None, longattn.Plan(attention="window:16", train_attention="group:8"))
    expected = next_token_losses(changed, tokens(1, 64))
    changed.train()
    assert torch.equal(next_token_losses(changed, tokens(1, 64)), expected)
    assert changed.training and not torch.allclose(next_token_losses(model, tokens(1, 64)), expected, rtol=1e-3)
    with pytest.raises(ValueError, match="next_token_losses: keep must be 1 to 63 of 64 tokens, got 64"):
        next_token_losses(changed, tokens(1, 64), 64)


@pytest.mark.parametrize("fused", [False, True])
def test_dynamic_rope_is_that_of_the_text_whatever_was_read_before(fused):
    """transformers keeps the frequencies of the longest text; neither a loss nor an answer is to depend on that."""

    def dynamic():
        changed = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
        longattn.extend(changed, None, longattn.Plan(rope={"rope_type": "dynamic", "factor": 4.0}))
        return longattn.hf.use_fused_rope(changed) if fused else changed

    ids, used = tokens(1, 600), dynamic()
    next_token_losses(used, ids, 8)
    for length in (400, 256):
        expected = next_token_losses(dynamic(), ids[:, :length], 8)
        assert torch.equal(next_token_losses(used, ids[:, :length], 8), expected)
        next_token_losses(used, ids, 8)
    prompt = ids[0, :300].tolist()
    with_fresh = greedy(dynamic(), prompt, 12)
    used(input_ids=ids)
    assert greedy(used, prompt, 12) == with_fresh


def test_windows_end_at_the_same_characters_whatever_the_tokenizer(tokenizer):
    docs = [Document("a.py", "".join(chr(97 + i * i % 26) for i in range(300)))]
    (one,) = scoring_windows(docs, tokenizer, count=5, longest=64, target_chars=16, ends=(200,))
    (other,) = scoring_windows(docs, Pairs(), count=5, longest=64, target_chars=16, ends=(200,))
    assert bytes(one.ids).decode() == docs[0].text[136:200]
    assert (one.num_targets, one.num_bytes) == (16, 16)
    assert (len(other.ids), other.num_targets, other.num_bytes) == (64, 8, 16)


def test_ends_are_spread_over_texts_and_within_them(tokenizer):
    docs = [Document("short", "x" * 50), Document("exact", "y" * 100), Document("long", "z" * 500)]
    ends = spread_ends(docs, tokenizer, count=5, longest=100, target_chars=20)
    assert [(doc.name, end) for doc, end in ends][:2] == [("exact", 100), ("long", 500)]
    places = sorted(end for doc, end in ends if doc.name == "long")
    assert len(places) == 3 and 100 <= places[0] <= 130 and places[2] == 500
    windows = list(windows_at(ends, tokenizer, longest=100, target_chars=20))
    assert all(window is not None and len(window.ids) == 100 for window in windows)
    assert spread_ends(docs, tokenizer, count=5, longest=501, target_chars=20) == []
    # no two windows score the same characters
    many = spread_ends(docs[2:], tokenizer, count=1000, longest=100, target_chars=20)
    places = sorted(end for _, end in many)
    assert min(b - a for a, b in zip(places, places[1:], strict=False)) >= 20


def test_token_that_opens_a_text_opens_every_context():
    tokenizer = build_tokenizer()
    ends = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ends)
    docs = [Document("a", " ".join(f"w{i % 50}" for i in range(200)))]
    (window,) = scoring_windows(docs, tokenizer, count=1, longest=40, target_chars=15)
    assert (len(window.ids), window.first) == (39, tokenizer.bos_token_id)
    assert window.tail(12) == [window.first, *window.ids[-11:]]
    assert window.tail(40) == [window.first, *window.ids]
    with pytest.raises(ValueError, match="context must be .* to 40 tokens for a piece of 'a'.*got 41"):
        window.tail(41)


def test_score_is_of_the_last_tokens_alone(model, tokenizer):
    windows = scoring_windows(read_documents(scored=True, min_chars=4096), tokenizer, count=3, longest=300)
    counts = (128, 40, 7)
    windows = [replace(window, num_targets=n, num_bytes=n // 2) for window, n in zip(windows, counts, strict=True)]
    done = []
    score = score_last(model, windows, 200, on_batch=done.append)
    nats = [-log_p(model, list(window.ids[-200:]))[-window.num_targets :].sum().item() for window in windows]
    assert score.nats == pytest.approx(sum(nats), rel=1e-5)
    assert (score.context, score.tokens, score.num_bytes, score.windows, sum(done)) == (200, 175, 87, 3, 3)
    # the mean is over tokens, not over windows
    assert score.perplexity == pytest.approx(math.exp(sum(nats) / 175), rel=1e-5)
    assert score.byte_perplexity == pytest.approx(math.exp(sum(nats) / 87), rel=1e-5)
    assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score
    with pytest.raises(ValueError, match="score_last: windows must hold at least one"):
        score_last(model, [], 200)


def test_sliding_scores_are_those_of_the_papers(model):
    texts = [tokens(1, 64 + 2 * 16 + 5, seed=1)[0].tolist(), tokens(1, 64, seed=2)[0].tolist(), [5] * 10]
    score = score_sliding(model, texts, 64, stride=16)
    windows = [texts[0][:64], texts[0][16:80], texts[0][32:96], texts[1]]
    all_of = [-log_p(model, window) for window in windows]
    once = [all_of[0], all_of[1][-16:], all_of[2][-16:], all_of[3]]
    assert score.longlora == pytest.approx(torch.cat(all_of).mean().exp().item(), rel=1e-5)
    assert score.yarn == pytest.approx(torch.cat(once).mean().exp().item(), rel=1e-5)
    assert (score.windows, score.documents, score.length, score.stride) == (4, 2, 64, 16)
    # of few windows each text has one before any has two
    fewer = score_sliding(model, texts, 64, stride=16, max_windows=2)
    assert fewer.longlora == pytest.approx(torch.cat([all_of[0], all_of[3]]).mean().exp().item(), rel=1e-5)
    assert fewer.longlora == pytest.approx(fewer.yarn) and fewer.documents == 2
    opened = score_sliding(model, texts[1:], 65, stride=16, first=256)
    assert opened.yarn == pytest.approx((-log_p(model, [256, *texts[1]])).mean().exp().item(), rel=1e-5)
    assert SlidingScore.from_dict(json.loads(json.dumps(score.to_dict()))) == score


def test_sliding_refuses_what_it_cannot_score(model):
    with pytest.raises(ValueError, match="texts must hold one of 64 tokens.*got 10 tokens in the longest text"):
        score_sliding(model, [[5] * 10], 64, stride=16)
    with pytest.raises(ValueError, match="score_sliding: stride must be 1 to 63, below length 64, got 64"):
        score_sliding(model, [[5] * 100], 64, stride=64)


def test_leading_tokens_stop_early(tokenizer):
    docs = [Document("a", "ab" * 5000), Document("b", "xyz")]
    long, short = leading_tokens(docs, tokenizer, 101)
    assert bytes(long).decode() == "ab" * 50 + "a" and bytes(short) == b"xyz"


def test_token_loss_is_of_the_named_tokens(model, tokenizer):
    ids = encode(tokenizer, "for name in names:\n    print(name)\n" * 3)
    window = ScoringWindow("a", tuple(ids), 4, 4)
    loss, places = token_loss(model, [window], 60, [ord("n"), ord("(")])
    kept = ids[-60:]
    picked = [-value for value, token in zip(log_p(model, kept).tolist(), kept[1:], strict=True) if chr(token) in "n("]
    assert (loss, places) == (pytest.approx(sum(picked) / len(picked), rel=1e-5), len(picked))
    with pytest.raises(ValueError, match=r"token_loss: tokens \[0\] never occur"):
        token_loss(model, [window], 60, [0])


def test_scores_that_are_no_numbers_are_null_in_json():
    score = Score(8, math.nan, 4, 4, 1)
    stored = json.loads(json.dumps(score.to_dict(), allow_nan=False))
    assert stored["nats"] is None and stored["perplexity"] is None and math.isnan(Score.from_dict(stored).nats)
    assert Score(8, 1e6, 4, 4, 1).perplexity == math.inf


def test_documents_have_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("def")
    (tmp_path / "a.md").write_text("# a")
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    names = [(doc.name, doc.text) for doc in load_documents(tmp_path)]
    assert names == [("a.md", "# a"), ("b/c.txt", "def"), ("d.jsonl:1", "one"), ("d.jsonl:3", "two")]
    assert list(load_documents(tmp_path / "a.md")) == [Document("a.md", "# a")]
