"""Runs of `longattn train` on a tiny checkpoint: what they read, and what ends them early."""

from __future__ import annotations

from pathlib import Path

import torch
from hf_models import build, build_tokenizer

from longattn.train import TrainSpec

STEPS, LENGTH = 4, 128
PLAN = dict(
    rope={"rope_type": "yarn", "factor": 4.0},
    train_attention="group:32+shift",
    tokens={"tokens": ["<tool>"], "init": {"<tool>": "w1 w2"}},
)
RUN = dict(length=LENGTH, steps=STEPS, batch=2, learning_rate=1e-2, rank=2, save_every=2, **PLAN)


def write_home(folder: Path) -> Path:
    """Writes a tiny checkpoint, and text to train on and to hold out, into `folder`."""
    build("llama", torch.float32, num_hidden_layers=2, initializer_range=0.1).save_pretrained(folder / "src")
    build_tokenizer().save_pretrained(folder / "src")
    (folder / "src" / "README.md").write_text("---\nlicense: mit\n---\n# A model\n\nIt is good.\n")
    (folder / "src" / "LICENSE").write_text("Do as you like.\n")
    (folder / "text").mkdir()
    for number in range(6):
        words = [f"w{(number + step) % 50}" for step in range(300)]
        words[::20] = ["<tool>"] * len(words[::20])
        (folder / "text" / f"{number}.txt").write_text(" ".join(words))
    (folder / "held.txt").write_text(" ".join(f"w{step % 50}" for step in range(300)))
    return folder


def spec(home, out, **more) -> TrainSpec:
    places = dict(model=str(home / "src"), text=str(home / "text"), out=str(out))
    return TrainSpec.from_dict({**places, **RUN, **more})


def losses(log, key="loss"):
    return {entry["step"]: entry[key] for entry in log["history"] if key in entry}


class Stop(BaseException):
    """Ends a run as Ctrl-C does."""


def stop_at(step):
    def progress(doing, at, steps, entry):
        if doing == "training" and at == step:
            raise Stop

    return progress
