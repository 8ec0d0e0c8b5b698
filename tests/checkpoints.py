"""Small real checkpoints on disk, and what tests compare of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from hf_models import build, build_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

INDEX = "model.safetensors.index.json"
SHARD_SIZE = "20KB"  # several shards of the tiny models
STORED_TOKENS = 60  # for 64 rows (Qwen2's class adds one more when it loads them)


def write_checkpoint(folder: Path, family: str = "llama", *, shard_size: str = SHARD_SIZE, **fields) -> Path:
    """A checkpoint with everything that a folder from the Hub may hold: bfloat16 weights but for float32 norms."""
    model = build(family, torch.bfloat16, **fields)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, temperature=0.7, do_sample=True
    )
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer = build_tokenizer(STORED_TOKENS)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "README.md").write_text("---\nlicense: other\n---\n# A model\n")
    (folder / "modeling_extra.py").write_text("LAYERS = 4\n")
    (folder / "assets").mkdir()
    (folder / "assets" / "notes.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "download.lock").write_text("")
    return folder


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stored(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """Every tensor of a checkpoint and the file that holds it, as safetensors itself reads them."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: (path.name, file.get_tensor(name)) for name in file.keys()})
    return tensors


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps({**read_json(path), **fields}), encoding="utf-8")


def rewrite(folder, edit):
    """Write all tensors anew as one file, after `edit` has changed them by name."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
        path.unlink()
    (folder / INDEX).unlink()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
