"""Generation far past the training length: memory and speed of a cache that stays flat, beside one that keeps all.

    python benchmarks/serving.py --out benchmarks/results    # about 5 minutes on 2 cores

A text is read into the cache up to a length, then tokens are decoded one by one and timed; so on to the next length, in
one cache. The demo's trained model (256 tokens at a time) reads the standard library, so that its loss at the decoded
tokens says what each cache is worth; a wider model with random weights shows speed where attention weighs more. Rows:
the model as it is, with every key kept; windows with sinks; windows alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM, logging

import longattn
from longattn.bench.machine import load_average, machine_facts
from longattn.cli.eval import parse_lengths
from longattn.demo import MODEL_FOLDER
from longattn.demo.finetune import token_stream
from longattn.demo.text import read_documents

CHUNK = 1024  # tokens read at a time
PATTERNS = {"full cache": None, "window:{0}+sinks:4": "window:{0}+sinks:4", "window:{0}": "window:{0}"}
WINDOWS = {"trained": 252, "wide": 1020}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Flat caches beside one that keeps every key.")
    parser.add_argument("--lengths", default="1k,4k,16k,32k", help="tokens in the cache at which to decode")
    parser.add_argument("--decode", type=int, default=256, help="tokens to decode at each length")
    parser.add_argument("--models", default="trained,wide", help="which models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("longattn-bench"))
    return parser.parse_args()


def build(name: str, pattern: str | None) -> Any:
    """A model that attends by the pattern in all layers, or as it is."""
    if name == "trained":
        model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
    else:
        torch.manual_seed(0)
        shape = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8)
        heads = dict(num_attention_heads=8, num_key_value_heads=2, head_dim=64)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=1024, **shape, **heads))
    if pattern is not None:
        longattn.extend(model, None, longattn.Plan(attention=pattern))
    return model.eval()


def cache_bytes(cache: DynamicCache) -> int:
    """Memory that the keys and values lie in, counted once."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@torch.no_grad()
def measure(model: Any, ids: Tensor, lengths: list[int], decode: int) -> Iterator[dict[str, Any]]:
    """At each length: bytes held, decoded tokens a second, and the mean loss of the decoded tokens, in nats."""
    cache, read = DynamicCache(config=model.config), 0
    for length in lengths:
        while read < length - decode:
            stop = min(read + CHUNK, length - decode)
            model(ids[:, read:stop], None, None, cache, logits_to_keep=1)
            read = stop
        losses = []
        started = time.perf_counter()
        for at in range(read, length):
            logits = model(ids[:, at : at + 1], None, None, cache).logits[0]
            losses.append(cross_entropy(logits, ids[0, at + 1 : at + 2]))
        seconds = time.perf_counter() - started
        read = length
        yield {
            "length": length,
            "cache_bytes": cache_bytes(cache),
            "tokens_per_second": round(decode / seconds, 1),
            "loss": round(torch.stack(losses).mean().item(), 4),
        }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A row of panels a model: memory, speed, and, where it was trained, the loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(12, 3.6 * len(names)), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = {
        "cache_bytes": "cache, bytes",
        "tokens_per_second": "decoded tokens a second",
        "loss": "loss, nats a token",
    }
    caches = {name: list(dict.fromkeys(row["cache"] for row in rows if row["model"] == name)) for name in names}
    for line, name in zip(figure.subplots(len(names), 3, squeeze=False), names, strict=True):
        for axes, (key, label) in zip(line, panels.items(), strict=True):
            if key == "loss" and name != "trained":
                axes.set_visible(False)
                continue
            for cache, style in zip(caches[name], "os^", strict=True):
                mine = [row for row in rows if (row["model"], row["cache"]) == (name, cache)]
                axes.plot([r["length"] for r in mine], [r[key] for r in mine], marker=style, label=cache)
            axes.set_xscale("log", base=2)
            if key == "cache_bytes":
                axes.set_yscale("log")
            axes.set_title(f"{name} model: {label}", fontsize=10, loc="left")
            axes.set_xlabel("tokens so far", fontsize=9)
            axes.grid(alpha=0.3)
        line[0].legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    options = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    lengths = parse_lengths(options.lengths)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    # files that the shipped model was not trained on
    ids = token_stream(read_documents(scored=True), tokenizer, max_chars=2 * lengths[-1])[None]  # (1, N)
    machine, load, rows = machine_facts(), load_average(), []
    for name in options.models.split(","):
        for cache, pattern in PATTERNS.items():
            model = build(name, pattern and pattern.format(WINDOWS[name]))
            for row in measure(model, ids, lengths, options.decode):
                rows.append({"model": name, "cache": cache.format(WINDOWS[name]), **row})
                print(" ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"serving-{machine['date'][:10]}"
    command = " ".join(["python", *sys.argv])
    record = {"command": command, "machine": machine, "load_before": load, "load_after": load_average(), "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(rows, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
