"""However documents are put into a batch, training on it is training on them one by one."""

from __future__ import annotations

import pytest
import torch
from hf_models import TRAINED, VOCAB
from training_helpers import assert_gradients_agree, extended, take_gradients
from transformers import DataCollatorWithFlattening, PreTrainedModel

LENGTHS = (5, 13, 1, 8)
IGNORED = -100


def documents(new_ids: list[int]) -> list[torch.Tensor]:
    """Texts of different lengths, with the new tokens in them."""
    drawn = torch.randint(3, VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    drawn[torch.tensor([3, 9])] = torch.tensor(new_ids)
    return list(drawn.split(LENGTHS))


def train(model: PreTrainedModel, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss of a token over all batches, and its gradients."""
    predicted = sum(LENGTHS) - len(LENGTHS)  # a document's first token is not predicted
    loss = sum(model(**batch, num_items_in_batch=predicted).loss for batch in batches)
    loss.backward()
    return loss.item(), take_gradients(model)


def one_by_one(texts: list[torch.Tensor]) -> list[dict]:
    return [{"input_ids": text[None], "labels": text[None]} for text in texts]


def packed(texts: list[torch.Tensor], *, positions: bool, borders: bool) -> list[dict]:
    """One row of all documents, as transformers' own collator packs them."""
    collate = DataCollatorWithFlattening(return_position_ids=positions, return_flash_attn_kwargs=borders)
    batch = collate([{"input_ids": text.tolist()} for text in texts])
    assert ("position_ids" in batch) == positions and ("cu_seq_lens_q" in batch) == borders
    return [dict(batch)]


def packed_rows(texts: list[torch.Tensor]) -> list[dict]:
    """Two documents a row, told apart by their positions; the shorter row goes on with a document of padding."""
    rows = [dict(packed(pair, positions=True, borders=False)[0]) for pair in (texts[:2], texts[2:])]
    fill = rows[0]["input_ids"].shape[1] - rows[1]["input_ids"].shape[1]
    padding = {"input_ids": torch.zeros(1, fill), "labels": torch.full((1, fill), IGNORED)}
    padding["position_ids"] = torch.arange(fill)[None]
    rows[1] = {name: torch.cat([values, padding[name].long()], 1) for name, values in rows[1].items()}
    return [{name: torch.cat([row[name] for row in rows]) for name in rows[0]}]


def padded(texts: list[torch.Tensor], side: str) -> list[dict]:
    """One document a row, padded at its left or right."""
    batch = {}
    for name, fill in (("input_ids", 0), ("labels", IGNORED), ("attention_mask", 0)):
        values = [torch.ones_like(text) if name == "attention_mask" else text for text in texts]
        batch[name] = torch.nn.utils.rnn.pad_sequence(values, True, fill, padding_side=side)
    if side == "left":  # transformers predicts the first token of a left-padded document, from its padding
        batch["labels"][torch.arange(len(texts)), -torch.tensor(LENGTHS)] = IGNORED
    return [batch]


BATCHES = {
    "packed by position_ids": lambda texts: packed(texts, positions=True, borders=False),
    "packed by cu_seq_lens": lambda texts: packed(texts, positions=False, borders=True),
    "packed by both": lambda texts: packed(texts, positions=True, borders=True),
    "packed in two rows": packed_rows,
    "padded left": lambda texts: padded(texts, "left"),
    "padded right": lambda texts: padded(texts, "right"),
}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("family", TRAINED)
def test_batches_train_as_documents_one_by_one(family, use_cache):
    model, _, new_ids = extended(family, torch.float64)
    model.train()
    texts = documents(new_ids)
    expected, gradients = train(model, one_by_one(texts))
    for name, batches in BATCHES.items():
        given = [{**batch, "use_cache": use_cache} for batch in batches(texts)]
        loss, got = train(model, given)
        # rotary angles are formed in float32, of other positions where documents don't begin at 0
        assert loss == pytest.approx(expected, rel=1e-6), name
        assert_gradients_agree(got, gradients, 1e-5)


@pytest.mark.parametrize("family", TRAINED)
def test_serving_pattern_gives_packed_documents_the_same_loss(family):
    model, _, new_ids = extended(family, torch.float64)
    texts = documents(new_ids)
    expected, _ = train(model.eval(), one_by_one(texts))
    trained, _ = train(model.train(), one_by_one(texts))
    assert abs(expected - trained) > 1e-3 * expected
    model.eval()
    for name, batches in BATCHES.items():
        assert train(model, batches(texts))[0] == pytest.approx(expected, rel=1e-6), name


def test_packing_that_is_not_told_mixes_documents():
    model, _, new_ids = extended("llama", torch.float64)
    model.train()
    texts = documents(new_ids)
    expected, _ = train(model, one_by_one(texts))
    (untold,) = packed(texts, positions=True, borders=False)
    del untold["position_ids"]
    assert abs(train(model, [untold])[0] - expected) > 1e-3 * expected
