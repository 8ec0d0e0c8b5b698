"""The files in examples/ run as their first lines say, and do what one process would."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "context_parallel.py"
HOLDS, RANKS = 256, 2


def example():
    spec = importlib.util.spec_from_file_location("context_parallel", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(ranks: int, *flags: object) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launch, str(EXAMPLE), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True)


def test_example_trains_as_one_process_and_says_what_it_sent():
    done = run(RANKS, "--holds", HOLDS, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert "1024 tokens a sequence, 4 times the 256 that a rank holds: 512 on each of 2 ranks, with" in done.stdout
    losses = [float(text) for text in re.findall(r"loss ([\d.]+)", done.stdout)]

    module = example()
    model, tokenizer = module.extended(4 * HOLDS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    expected = []
    for ids in module.sequences(tokenizer, 4 * HOLDS, 2).split(1):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss))
    assert [abs(a - b) < 1e-4 for a, b in zip(losses, expected, strict=True)] == [True, True], (losses, expected)

    sent = [int(text.replace(",", "")) for text in re.findall(r"rank \d: a step sent ([\d,]+) bytes", done.stdout)]
    token = 2 * 2 * 32 * 4  # keys and values of 2 heads of 32 channels in float32
    halo = 3 * (255 + 4) * token  # of 3 layers: the window's reach and the sinks
    assert sent == [2 * halo, halo]  # with checkpointing forth twice, back once
    assert len(re.findall(r"; [\d,]+ tokens/s", done.stdout)) == RANKS


def test_example_refuses_what_its_ranks_cannot_hold():
    done = run(1, "--holds", HOLDS)
    assert done.returncode != 0 and "give more ranks" in done.stderr
