"""Retrieval: questions fit their length under any tokenizer, answers stand where they should, only exact ones count."""

from __future__ import annotations

import json
import random
import re

import pytest

pytest.importorskip("transformers")

import torch
from reader_model import Reader
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from longattn.demo import MODEL_FOLDER
from longattn.evaluate import TASKS, Cell, MultiKey, Passkey, encode, evaluate_retrieval, greedy
from longattn.evaluate.retrieval import is_answer

PASSKEY, MULTIKEY = TASKS["passkey"], TASKS["multikey"]


def words(special: bool) -> PreTrainedTokenizerFast:
    """A token a word, numbers a token a digit; with a token before and one after every text, or without."""
    text = " ".join(
        bytes(task.question(byte_tokenizer(), 1000, 0.5, random.Random(seed)).ids).decode()
        for task in TASKS.values()
        for seed in range(40)
    )
    found = sorted(set(re.findall(r"[A-Za-z]+|\d|[^\w\s]", text)))
    vocab = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *found, *map(str, range(10))])}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    if special:
        ends = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=10**9
    )


def byte_tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_FOLDER, model_max_length=10**9)


TOKENIZERS = {"bytes": byte_tokenizer, "words": lambda: words(False), "words with ends": lambda: words(True)}


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_question_fills_its_length_and_no_more(kind, task):
    tokenizer = TOKENIZERS[kind]()
    for length in (800, 2000):
        for depth in (0.0, 0.3, 1.0):
            question = task.question(tokenizer, length, depth, random.Random(7))
            assert len(encode(tokenizer, f" {question.answer}")) == question.answer_tokens
            # a sentence of filler has 30 bytes at most
            assert length - 31 <= len(question.ids) + question.answer_tokens <= length
            assert ("</s>" in tokenizer.convert_ids_to_tokens(question.ids)) is False
            assert (question.ids[0] == tokenizer.bos_token_id) == (kind == "words with ends")


def test_needle_stands_at_its_depth(bytes_tokenizer):
    for task, needle in ((PASSKEY, "Remember it."), (MULTIKEY, "One of the special magic numbers for {} is: {}.")):
        for depth in (0.0, 0.25, 0.5, 1.0):
            question = task.question(bytes_tokenizer, 4000, depth, random.Random(3))
            _, text, asked = bytes(question.ids).decode().split("\n")
            name = re.search(r"number for (\w+)", asked)
            place = text.index(needle.format(name and name[1], question.answer)) / len(text)
            assert abs(place - depth) < 0.07, (task.name, depth, place)
            assert question.answer in text


def test_multikey_asks_for_one_of_several_numbers(bytes_tokenizer):
    text = bytes(MultiKey(keys=6).question(bytes_tokenizer, 3000, 0.5, random.Random(1)).ids).decode()
    told = dict(re.findall(r"magic numbers for (\w+) is: (\d+)\.", text))
    assert len(told) == len(set(told.values())) == 6
    assert re.search(r"number for (\w+) mentioned", text)[1] in told
    with pytest.raises(ValueError, match="MultiKey: keys must be 2 to 16, got 1"):
        MultiKey(keys=1)


def test_questions_are_the_same_again_and_differ_between_trials(bytes_tokenizer):
    reader = Reader(sight=1)
    runs = [evaluate_retrieval(reader, bytes_tokenizer, [PASSKEY], [600], trials=2, seed=seed) for seed in (0, 0, 1)]
    asked = [[wanted for cell in cells for wanted, _ in cell.wrong] for cells in runs]
    assert asked[0] == asked[1] != asked[2]
    assert len(set(asked[0])) == len(asked[0]) == 10


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_reader_finds_what_it_can_see(bytes_tokenizer, task):
    """What a model of limited sight finds is what stands within it."""
    cells = evaluate_retrieval(Reader(), bytes_tokenizer, [task], [800, 2000], trials=3)
    assert [cell.accuracy for cell in cells] == [1.0] * 10
    cells = evaluate_retrieval(Reader(sight=900), bytes_tokenizer, [task], [800, 2000], trials=3)
    assert {(cell.length, cell.depth): cell.accuracy for cell in cells} == {
        **{(800, depth): 1.0 for depth in (0.0, 0.25, 0.5, 0.75, 1.0)},
        **{(2000, depth): 0.0 for depth in (0.0, 0.25, 0.5)},
        **{(2000, depth): 1.0 for depth in (0.75, 1.0)},
    }
    assert all(len(cell.wrong) == cell.trials - cell.correct for cell in cells)


def test_known_cells_are_not_measured_again(bytes_tokenizer):
    saved: list[Cell] = []
    reader = Reader(sight=900)
    evaluate_retrieval(reader, bytes_tokenizer, [PASSKEY], [800], depths=[0.0, 1.0], trials=2, on_cell=saved.append)
    known = [Cell.from_dict(json.loads(json.dumps(cell.to_dict()))) for cell in saved]
    assert known == saved
    before = reader.calls
    cells = evaluate_retrieval(
        reader, bytes_tokenizer, [PASSKEY], [800], depths=[0.0, 0.5, 1.0], trials=2, known=known, on_cell=saved.append
    )
    assert reader.calls - before == 2 * 7  # two questions, whose answers have a space, five digits, and an end of text
    assert [cell.depth for cell in cells] == [0.0, 0.5, 1.0] and len(saved) == 3
    other = evaluate_retrieval(reader, bytes_tokenizer, [PASSKEY], [800], depths=[0.0], trials=2, seed=1, known=known)
    assert other != known[:1]  # another seed is another measurement


@pytest.mark.parametrize(
    ("text", "found"),
    [(" 123", True), ("123.", True), ("\n123 is", True), (" 1234", False), (" 12", False), ("x 123", False)],
)
def test_only_the_exact_answer_counts(text, found):
    assert is_answer(text, "123") is found


def test_greedy_is_what_the_logits_say(bytes_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
    model.generation_config.repetition_penalty = 5.0  # of which greedy decoding takes no notice
    ids = encode(bytes_tokenizer, "import os\nimport ")
    model.train()
    written = greedy(model, ids, 12)
    assert model.training
    model.eval()
    with torch.no_grad():
        for count in range(12):
            logits = model(input_ids=torch.tensor([[*ids, *written[:count]]])).logits
            assert int(logits[0, -1].argmax()) == written[count]


def test_refusals(bytes_tokenizer):
    reader = Reader()
    with pytest.raises(ValueError, match=r"passkey: length must be at least 2\d\d tokens with this tokenizer, got 64"):
        evaluate_retrieval(reader, bytes_tokenizer, [PASSKEY], [64])
    with pytest.raises(ValueError, match="evaluate_retrieval: trials must be at least 1, got 0"):
        evaluate_retrieval(reader, bytes_tokenizer, [PASSKEY], [800], trials=0)
    with pytest.raises(ValueError, match="evaluate_retrieval: depths must be 0 to 1, got 1.5"):
        evaluate_retrieval(reader, bytes_tokenizer, [PASSKEY], [800], depths=[1.5])
    with pytest.raises(TypeError, match="evaluate_retrieval: model must be a transformers PreTrainedModel, got Linear"):
        evaluate_retrieval(torch.nn.Linear(1, 1), bytes_tokenizer, [PASSKEY], [800])


class Talker(Reader):
    """Never ends; counts the most tokens that it has read of one text."""

    read = 0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        self.read = max(self.read, len(cache.text))
        output.logits = torch.zeros(1, 1, 257).index_fill_(2, torch.tensor(49), 1.0)
        return output


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_no_more_tokens_than_the_length_are_read(bytes_tokenizer, task):
    """Learnt positions end there; and how much a model may write beyond the answer hangs on no length."""
    with pytest.raises(ValueError) as refused:
        task.question(bytes_tokenizer, 9, 0.5, random.Random(0))
    shortest = int(re.search(r"at least (\d+)", str(refused.value))[1])
    for length in (shortest, *range(shortest + 40, shortest + 80)):
        model = Talker()
        try:
            (cell,) = evaluate_retrieval(model, bytes_tokenizer, [task], [length], depths=[0.5], trials=1)
        except ValueError:  # the names of this question are longer
            assert length == shortest
            continue
        assert model.read <= length
        ((asked, wrote),) = cell.wrong
        assert len(wrote) == len(f" {asked}") + 3 or length == shortest


def test_shortest_question_has_no_filler(bytes_tokenizer):
    with pytest.raises(ValueError) as refused:
        Passkey().question(bytes_tokenizer, 9, 0.5, random.Random(0))
    shortest = int(re.search(r"at least (\d+)", str(refused.value))[1])
    question = Passkey().question(bytes_tokenizer, shortest, 0.5, random.Random(0))
    assert len(question.ids) + question.answer_tokens == shortest
