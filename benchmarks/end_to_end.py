"""Prefill and one training step of a small model with windows, under longattn and under transformers' own attention.

A 12-layer, 768-wide Mistral (a Llama whose layers see a window of 1024 keys), random weights, one row of tokens; the
same weights and tokens for every implementation. Logits of a short prefill are compared with longattn's first. What an
implementation can't do is reported as it said it. Where longattn's time goes is what torch's profiler says.

Every measurement is written as soon as it is there, and a second run goes on where the first one ended:

    python benchmarks/end_to_end.py --out benchmarks/results --most 1    # again until nothing is left
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import MistralConfig, MistralForCausalLM

import longattn.hf  # noqa: F401  # registers the attention
from longattn.bench.machine import load_average, machine_facts
from longattn.bench.text import first_line

OURS, PEERS = "longattn", ("sdpa", "flex_attention")
WINDOW, VOCABULARY, LAYERS, WIDTH = 1024, 8192, 12, 768
KINDS = {  # what an operator's own time counts as
    "attention": ("longattn::_", "aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "mkldnn"),
    "optimizer": ("aten::_fused_adamw", "Optimizer."),
    "loss": ("aten::_log_softmax", "aten::nll_loss", "aten::_softmax"),
    "copies and casts": ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::cat", "aten::fill_", "aten::zero_"),
}


def make_model(implementation: str, dtype: torch.dtype) -> MistralForCausalLM:
    torch.manual_seed(0)
    heads = WIDTH // 64
    sizes = dict(hidden_size=WIDTH, intermediate_size=8 * WIDTH // 3, num_hidden_layers=LAYERS)
    config = MistralConfig(
        **sizes, num_attention_heads=heads, num_key_value_heads=heads, sliding_window=WINDOW, vocab_size=VOCABULARY
    )
    config.max_position_embeddings = 1 << 20
    config._attn_implementation = implementation
    return MistralForCausalLM(config).to(dtype)


def prefill(model: MistralForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens, logits_to_keep=1, use_cache=False).logits


def train_step(model: MistralForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def timed(run: Callable[[], Any], most: int) -> list[float]:
    """Seconds of up to `most` runs, and of one where a run takes a minute."""
    times: list[float] = []
    while len(times) < most and (not times or times[0] < 60):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return times


def shares(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of processor time by kind of operator."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "the rest")
        found[kind] += event.self_cpu_time_total / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure(implementation: str, work: str, tokens: torch.Tensor, dtype: str, runs: int) -> dict[str, Any]:
    """One row of the results."""
    row: dict[str, Any] = {"implementation": implementation, "work": work, "tokens": tokens.shape[1], "dtype": dtype}
    try:
        short = tokens[:, : max(2, tokens.shape[1] // 8)]
        expected, got = (
            prefill(make_model(name, getattr(torch, dtype)), short).float() for name in (OURS, implementation)
        )
        row["difference"] = float((got - expected).norm() / expected.norm())
        model = make_model(implementation, getattr(torch, dtype))
        if implementation == "flex_attention":  # compiles for each length
            WORKS[work](model, tokens)
        row["seconds"] = timed(lambda: WORKS[work](model, tokens), runs)
        if implementation == OURS:
            row["profile"] = shares(lambda: WORKS[work](model, tokens))
    except Exception as error:
        row["trouble"] = first_line(error)
    return row


WORKS = {"prefill": prefill, "training step": train_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--most", type=int, default=100, help="measurements in this run")
    parser.add_argument("--out", type=Path, default=Path("longattn-bench"))
    arguments = parser.parse_args()
    machine = machine_facts()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"end-to-end-{machine['date'][:10]}.json"
    run = json.loads(path.read_text()) if path.exists() else {"format": 1, "machine": machine, "rows": []}
    tokens = torch.randint(VOCABULARY, (1, arguments.tokens), generator=torch.Generator().manual_seed(1))
    done = {(row["implementation"], row["work"], row["tokens"], row["dtype"]) for row in run["rows"]}
    plan = [(name, work) for work in WORKS for name in (OURS, *PEERS)]
    left = [leg for leg in plan if (*leg, arguments.tokens, arguments.dtype) not in done]
    for name, work in left[: arguments.most]:
        before = load_average()
        row = measure(name, work, tokens, arguments.dtype, arguments.runs)
        run["rows"].append({**row, "load_before": before, "load_after": load_average()})
        path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row), flush=True)
    print(f"{len(left[arguments.most :])} left; {path}")


if __name__ == "__main__":
    main()
