"""A causal language model made of regular expressions: it answers the tasks' questions from the bytes it can see."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

PASSKEY = (re.compile(rb"The pass key is (\d+)\."), re.compile(rb"The pass key is( ?\d*)$"))
NUMBER = (
    re.compile(rb"numbers for (\w+) is: (\d+)\."),
    re.compile(rb"number for (\w+) mentioned in the provided text is( ?\d*)$"),
)


class Reader(PreTrainedModel):
    """Answers both tasks' questions from the last `sight` bytes; `calls` counts its forward passes."""

    config_class = PreTrainedConfig

    def __init__(self, sight: int = 1 << 30) -> None:
        super().__init__(PreTrainedConfig(num_hidden_layers=1))
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.generation_config = GenerationConfig(eos_token_id=256)
        self.sight, self.calls = sight, 0

    def forward(self, input_ids, cache=None, past_key_values=None, use_cache=None, logits_to_keep=0, return_dict=None):
        self.calls += 1
        cache = past_key_values if cache is None else cache
        cache.text = getattr(cache, "text", b"") + bytes(input_ids[0].tolist())
        logits = torch.zeros(1, 1, 257)
        logits[0, 0, next_byte(cache.text[-self.sight :])] = 1.0
        return CausalLMOutputWithPast(logits=logits)


def next_byte(text: bytes) -> int:
    told, asked = PASSKEY
    if found := asked.search(text):
        begun, answers = found[1], told.findall(text)
    elif found := NUMBER[1].search(text):
        begun, answers = found[2], [number for name, number in NUMBER[0].findall(text) if name == found[1]]
    else:
        return 63  # "?"
    rest = (b" " + answers[-1])[len(begun) :] if answers else b"?"
    return rest[0] if rest else 256
