"""Write on and on from a cache that does not grow: `python examples/streaming.py --tokens 2000`.

The demo's small Llama has read 256 tokens at a time. With windows every layer sees the last 252 tokens, and its cache
holds those and a few more, dropped some at a time. So the text may become any length: what a token costs, and the
memory that it takes, stay as they are. Sinks (`--attention window:252+sinks:4`) are for models that put much weight on
their first tokens; this one has never seen a first token so far away, and predicts better without them.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, logging

import longattn
from longattn.demo import MODEL_FOLDER

parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=2000, help="how many to write")
parser.add_argument("--attention", default="window:252", help="which tokens each layer sees")
options = parser.parse_args()
logging.disable_progress_bar()
torch.manual_seed(0)

model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER), AutoTokenizer.from_pretrained(MODEL_FOLDER)
longattn.extend(model, tokenizer, longattn.Plan(attention=options.attention))
cache = DynamicCache(config=model.config)
ids = tokenizer("import argparse\n", return_tensors="pt")["input_ids"]  # (1, prompt), then (1, 1)
with torch.no_grad():
    for _ in range(options.tokens):
        logits = model.eval()(ids, None, None, cache).logits[:, -1]  # (1, vocabulary)
        ids = (logits / 0.7).softmax(-1).multinomial(1)
        print(tokenizer.decode(ids[0]), end="", flush=True)
print(f"\nthe cache holds {cache.layers[0].keys.shape[2]} of {cache.get_seq_length()} tokens")
