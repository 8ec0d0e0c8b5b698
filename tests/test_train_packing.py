"""Texts are read from what people have, and laid into rows that hold every token once and in order."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import build, build_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from training_helpers import extended
from transformers import AutoTokenizer

from longattn.demo import MODEL_FOLDER
from longattn.train import packed_dataset, read_texts

DOCUMENTS = ["w1 w2 w3", "", "w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13"]
END = 2


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def stream(tokenizer):
    return [token for text in DOCUMENTS if text for token in (*tokenizer(text)["input_ids"], END)]


@pytest.mark.parametrize("length", [2, 3, 5, 17])
def test_rows_are_the_stream_cut(tokenizer, length):
    rows = packed_dataset(DOCUMENTS, tokenizer, length)
    expected = stream(tokenizer)
    assert rows.num_documents == 4 and len(rows) == len(expected) // length
    found = [token for row in rows for token in row["input_ids"].tolist()]
    assert found == expected[: len(rows) * length]
    assert all(row.keys() == {"input_ids", "labels"} and torch.equal(row["input_ids"], row["labels"]) for row in rows)


@settings(max_examples=60, deadline=None)
@example([1], 2)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(2, 12))
def test_separate_documents_count_from_their_start(sizes, length):
    texts = [" ".join(f"w{i % 50}" for i in range(size)) for size in sizes]
    total = sum(size + 1 for size in sizes if size)
    if total < length:
        return
    rows = packed_dataset(texts, build_tokenizer(), length, separate=True)
    starts, begin = set(), 0
    for size in sizes:
        if size:
            starts.add(begin)
            begin += size + 1
    for number, row in enumerate(rows):
        position = -1
        for column in range(length):
            at = number * length + column
            position = 0 if column == 0 or at in starts else position + 1
            assert row["position_ids"][column] == position
            assert row["labels"][column] == (-100 if at in starts else row["input_ids"][column])


def test_separate_rows_train_as_their_documents_do():
    model, tokenizer, _ = extended()
    rows = packed_dataset(DOCUMENTS, tokenizer, 16, separate=True)
    model.train()
    row = {name: value[None] for name, value in rows[0].items()}
    packed = model(**row, num_items_in_batch=12).loss
    pieces = [[*tokenizer(text)["input_ids"], END] for text in DOCUMENTS if text]
    pieces[-1] = pieces[-1][:2]  # the row ends before its end
    alone = [torch.tensor([piece]) for piece in pieces]
    torch.testing.assert_close(packed, sum(model(ids, labels=ids, num_items_in_batch=12).loss for ids in alone))


def test_many_documents_keep_their_order(tokenizer):
    texts = [f"w{number % 50}" for number in range(200)]
    rows = packed_dataset(iter(["", *texts]), tokenizer, 400)
    assert rows[0]["input_ids"].tolist() == [token for number in range(200) for token in (number % 50 + 3, END)]


def test_tokens_that_a_tokenizer_puts_around_a_text_stay(tokenizer):
    class Marked:
        eos_token_id, all_special_tokens = END, ["</s>"]

        def get_vocab(self):
            return tokenizer.get_vocab()

        def __call__(self, texts, verbose):
            return {"input_ids": [[1, *tokenizer(text)["input_ids"], END] for text in texts]}

    rows = packed_dataset(["w0", "w1"], Marked(), 6)
    assert rows[0]["input_ids"].tolist() == [1, 3, END, 1, 4, END]


def test_texts_are_read_from_files_folders_and_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = ["one", "two\r\nlines", "dèux"]
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name, text in zip(("a.txt", "b.md", "sub/c.py"), texts, strict=True):
        (folder / name).write_bytes(text.encode())
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("no")
    assert list(read_texts(folder)) == texts
    (folder / "z.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match=r"text: 1 of 4 files in .* are not UTF-8 and left out, such as z.bin"):
        assert list(read_texts(folder)) == texts
    rows = [{"text": text, "story": text.upper()} for text in texts]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    for name in ("rows.jsonl", "rows.parquet", "saved", "splits/train"):
        assert list(read_texts(tmp_path / name)) == texts, name
        assert list(read_texts(tmp_path / name, field="story")) == [text.upper() for text in texts], name
    with pytest.raises(ValueError, match="text: .*splits holds the splits train; give one, such as .*splits/train"):
        list(read_texts(tmp_path / "splits"))
    with pytest.raises(ValueError, match="must have text in the field 'body', got fields text, story"):
        list(read_texts(tmp_path / "rows.jsonl", field="body"))


def test_what_holds_no_text_is_refused(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "w1"}\n{"text": ')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    for name, message in {
        "empty": "text: .*empty holds no file",
        "bad.jsonl": "text: .*bad.jsonl, line 2 is not JSON",
        "list.jsonl": "text: .*list.jsonl, line 1 must hold an object with the field 'text', got list",
    }.items():
        with pytest.raises(ValueError, match=message):
            list(read_texts(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        packed_dataset(tmp_path / "absent", tokenizer, 4)
    with pytest.raises(ValueError, match="must fill at least one row of length 64, got 17 tokens of 4 documents"):
        packed_dataset(DOCUMENTS, tokenizer, 64)
    with pytest.raises(ValueError, match="length must be an int of at least 2, got 1"):
        packed_dataset(DOCUMENTS, tokenizer, 1)
    with pytest.raises(TypeError, match="documents must be texts, got int"):
        packed_dataset([1], tokenizer, 4)
    build("qwen2").config.save_pretrained(tmp_path)  # of a folder without a tokenizer transformers makes an empty one
    with pytest.raises(ValueError, match="the tokenizer must know more than special tokens"):
        packed_dataset(DOCUMENTS, AutoTokenizer.from_pretrained(tmp_path, eos_token="</s>"), 4)
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer must have an eos_token"):
        packed_dataset(DOCUMENTS, tokenizer, 4)


def test_a_byte_a_token_gives_the_text_back():
    text = "def f():\n    return 1\n" * 9
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    rows = packed_dataset([text], tokenizer, 11)
    assert tokenizer.decode(torch.cat([row["input_ids"] for row in rows])) == text[: 11 * len(rows)]
