"""Tasks of finding something in a long text: how the text, the question and the answer of each are written."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from longattn.evaluate.windows import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TASKS", "MultiKey", "Passkey", "Question", "Task", "TooShort"]

FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")

# Written beyond the answer's own: a model may write another space, or break the number otherwise.
SPARE_TOKENS = 3


@dataclass(frozen=True)
class Question:
    """A prompt's tokens, what the model should write next, and how many tokens that takes."""

    ids: tuple[int, ...]
    answer: str
    answer_tokens: int


class TooShort(ValueError):
    """A length that a question does not fit.

    Args:
        task: its name.
        least: tokens that the question and its answer take without any filler.
        length: tokens that there were for them.
    """

    def __init__(self, task: str, least: int, length: int) -> None:
        super().__init__(f"{task}: length must be at least {least} tokens with this tokenizer, got {length}")
        self.least = least


class Task(Protocol):
    """Anything that writes questions of a length, whose answer depends on what stands at a depth.

    `question` returns at most `length` tokens with its answer, and the same for the same `draw`; `depth` 0 puts what is
    looked for at the start of the text, 1 at its end.
    """

    @property
    def name(self) -> str: ...

    def question(
        self, tokenizer: PreTrainedTokenizerBase, length: int, depth: float, draw: random.Random
    ) -> Question: ...


@dataclass(frozen=True)
class Passkey:
    """A number told once in a text about nothing.

    Args:
        digits: of the number.
        filler: sentences that the text repeats in turn.

    Reference:
        Mohtashami and Jaggi 2023, "Landmark Attention", arXiv:2305.16300, whose words these are.

    Example:
        >>> Passkey().question(tokenizer, 4096, 0.5, random.Random(0)).answer
    """

    digits: int = 5
    filler: Sequence[str] = FILLER
    name: str = "passkey"

    def question(self, tokenizer: PreTrainedTokenizerBase, length: int, depth: float, draw: random.Random) -> Question:
        """See `Task`."""
        key = _number(draw, self.digits)
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."

        def text(sentences: int) -> str:
            return (
                "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will "
                "quiz you about the important information there.\n"
                f"{_filled(self.filler, sentences, [(depth, needle)])}\nWhat is the pass key? The pass key is"
            )

        return _fitted(self.name, tokenizer, text, key, length)


@dataclass(frozen=True)
class MultiKey:
    """Several numbers told in a text about nothing, each under a name, of which one is asked for.

    The others' places are drawn, so that the number must be found by its name and not by being one.

    Args:
        keys: names with a number each, 2 to 16.
        digits: of a number.
        filler: sentences that the text repeats in turn.

    Reference:
        Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?",
        arXiv:2404.06654: its multi-key needles in a haystack.

    Example:
        >>> MultiKey(keys=4).question(tokenizer, 4096, 0.5, random.Random(0)).answer
    """

    keys: int = 4
    digits: int = 5
    filler: Sequence[str] = FILLER
    name: str = "multikey"

    def __post_init__(self) -> None:
        if not 2 <= self.keys <= len(NAMES):
            raise ValueError(f"MultiKey: keys must be 2 to {len(NAMES)}, got {self.keys}")

    def question(self, tokenizer: PreTrainedTokenizerBase, length: int, depth: float, draw: random.Random) -> Question:
        """See `Task`."""
        names = draw.sample(NAMES, self.keys)
        numbers = [_number(draw, self.digits) for _ in names]
        places = [depth, *(draw.random() for _ in names[1:])]
        needles = [
            (place, f"One of the special magic numbers for {name} is: {number}.")
            for place, name, number in zip(places, names, numbers, strict=True)
        ]

        def text(sentences: int) -> str:
            return (
                "Some special magic numbers are hidden within the following text. Memorize them. I will quiz you "
                f"about the numbers afterwards.\n{_filled(self.filler, sentences, needles)}\nWhat is the special magic "
                f"number for {names[0]} mentioned in the provided text? The special magic number for {names[0]} "
                "mentioned in the provided text is"
            )

        return _fitted(self.name, tokenizer, text, numbers[0], length)


NAMES = (
    "amber", "basil", "cedar", "delta", "ember", "falcon", "garnet", "harbor",
    "indigo", "juniper", "lotus", "marble", "nectar", "orchid", "pepper", "quartz",
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in (Passkey(), MultiKey())}


def _number(draw: random.Random, digits: int) -> str:
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def _filled(filler: Sequence[str], sentences: int, needles: Sequence[tuple[float, str]]) -> str:
    """So many sentences with each needle after its share of them."""
    lines = [(float(at), filler[at % len(filler)]) for at in range(sentences)]
    lines += [(round(depth * sentences) - 0.5, needle) for depth, needle in needles]
    return " ".join(line for _, line in sorted(lines, key=lambda placed: placed[0]))


def _fitted(
    name: str, tokenizer: PreTrainedTokenizerBase, text: Callable[[int], str], answer: str, length: int
) -> Question:
    """The text with as many sentences as leave room for the answer, and for what is written beyond it, in `length`.

    A text without any sentence leaves room for the answer, at least.
    """
    answer_tokens = len(encode(tokenizer, f" {answer}"))
    room = length - answer_tokens
    shortest, sample = len(_prompt(tokenizer, text(0))), len(_prompt(tokenizer, text(64)))
    if shortest > room:
        raise TooShort(name, shortest + answer_tokens, length)
    sentence = max(1.0, (sample - shortest) / 64)
    filled = max(shortest, room - SPARE_TOKENS + 1)  # the last token written is not read
    count = int((filled - shortest) / sentence) + 1
    while True:
        ids = _prompt(tokenizer, text(count))
        if len(ids) <= filled:
            return Question(tuple(ids), answer, answer_tokens)
        count = max(0, count - max(1, int((len(ids) - filled) / sentence)))


def _prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that is to be continued: with the tokens that open a text, without one that ends it."""
    ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    return ids[:-1] if ids[-1] == getattr(tokenizer, "eos_token_id", None) else ids
