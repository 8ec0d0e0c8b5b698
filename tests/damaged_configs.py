"""Ways in which a checkpoint's configs, tokenizer and other files can be wrong, each with the words that refuse it."""

from __future__ import annotations

import json

from checkpoints import edit_json, read_json
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TOKEN = ["--add-token", "<tool>"]


def code_of_its_own(folder):
    (folder / "modeling_own.py").write_text(f"import os\nos.mkdir({str(folder.parent / 'owned')!r})\n")
    names = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    edit_json(folder / "config.json", model_type="own", auto_map=names)


def no_config(folder):
    (folder / "config.json").unlink()


def config_broken(folder):
    (folder / "config.json").write_text("{")


def config_of_a_list(folder):
    (folder / "config.json").write_text("[]")


def config_too_deep(folder):
    (folder / "config.json").write_text('{"a":' * 100_000)


def quantised(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def quantised_by_a_word(folder):
    edit_json(folder / "config.json", quantization_config="gptq")


def other_sizes(folder):
    edit_json(folder / "config.json", vocab_size=80)


def no_heads(folder):
    edit_json(folder / "config.json", num_attention_heads=0)


def length_in_words(folder):
    edit_json(folder / "config.json", max_position_embeddings="many")


def endless_layers(folder):
    edit_json(folder / "config.json", num_hidden_layers=10**9)


def theta_of_nan(folder):
    edit_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": float("nan")})


def theta_lost(folder):
    edit_json(folder / "config.json", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": None})


def unserved_family(folder):
    edit_json(folder / "config.json", model_type="bloom", architectures=["BloomForCausalLM"])


def unknown_family(folder):
    edit_json(folder / "config.json", model_type="gpt5", architectures=["GPT5ForCausalLM"])


def no_family(folder):
    fields = read_json(folder / "config.json")
    del fields["model_type"]
    (folder / "config.json").write_text(json.dumps(fields))


def newer_record(folder):
    edit_json(folder / "config.json", longattn={"version": 99})


def generation_config_broken(folder):
    (folder / "generation_config.json").write_text("{]")


def tokenizer_config_broken(folder):
    (folder / "tokenizer_config.json").write_text("{]")


def tokenizer_broken(folder):
    (folder / "tokenizer.json").write_text('{"model": 1}')
    return TOKEN


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return TOKEN


def write_tokenizer(folder, words):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def larger_tokenizer(folder):
    write_tokenizer(folder, ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(100))])
    return TOKEN


def other_tokenizer(folder):
    write_tokenizer(folder, ["<unk>", *(f"w{i}" for i in range(40)), "<s>", "</s>"])
    return TOKEN


def broken_link(folder):
    (folder / "notes.txt").symlink_to(folder / "gone.txt")


CONFIGS = [
    (code_of_its_own, "transformers refuses the config"),
    (no_config, "has no config.json"),
    (config_broken, "config.json is corrupt"),
    (config_of_a_list, "config.json must hold a JSON object, got list"),
    (config_too_deep, "config.json is corrupt"),
    (quantised, r"is quantised \(gptq\); extend the original"),
    (quantised_by_a_word, r"is quantised \(gptq\)"),
    (other_sizes, r"config.json makes model.embed_tokens.weight \[80, 32\], but .* holds \[64, 32\]"),
    (no_heads, "transformers (refuses the|builds no causal model of) config"),
    (length_in_words, "transformers refuses the config"),
    (endless_layers, "config.json has 1000000000 layers, but the weights are 39 tensors"),
    (theta_of_nan, "rope_theta.* must be a finite number above 1, got nan"),
    (theta_lost, "transformers builds no causal model of config.json"),
    (unserved_family, "model_type 'bloom' is not served"),
    (unknown_family, "transformers refuses the config .*gpt5"),
    (no_family, "transformers refuses the config"),
    (newer_record, "config.longattn must be a record of version 1, got 99; update longattn"),
    (generation_config_broken, "generation_config.json is corrupt"),
    (tokenizer_config_broken, "tokenizer_config.json is corrupt"),
    (tokenizer_broken, "transformers can't read the tokenizer"),
    (no_tokenizer, "has no tokenizer, so no tokens can be added to it"),
    (larger_tokenizer, "tokenizer must have ids below the 64 rows .* got 102: is it another model's"),
    (other_tokenizer, "must be the model's own, got one with bos_token_id 41, .* and eos_token_id 42"),
    (broken_link, "notes.txt is no file that can be copied"),
]
"""(damage, words): `damage(folder)` gives the plan's flags where the damage shows with others than a rope's."""
