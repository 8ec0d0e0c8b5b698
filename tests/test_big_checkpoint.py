"""A checkpoint of several GB, sparse on disk, extended by the command under a limit of memory far below its size."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoints import INDEX, STORED_TOKENS
from hf_models import build_tokenizer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

GIB = 2**30
LAYERS, HIDDEN, VOCAB = 8, 4096, 2048
CONFIG = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=8192,
    num_hidden_layers=LAYERS,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=2,
    dtype="bfloat16",
)
SHARDS = 3
# Of the input and output rows; the command holds the old and the new ones, twice as many, and slices of float64.
MATRICES = 2 * VOCAB * HIDDEN * 2
ALLOWED = 6 * MATRICES + 128 * 2**20

RUN = """
import resource, sys
import longattn.checkpoint, longattn.cli.extend, longattn.surgery, longattn.export
from transformers import AutoTokenizer, LlamaForCausalLM
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
held = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[1]), resource.RLIM_INFINITY))
from longattn.cli import app
sys.argv = ["longattn", *sys.argv[2:]]
try:
    app()
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("bytes of memory:", before, peak - before)
"""


def write_sparse(folder):
    """All tensors of a Llama as holes in files; the embeddings begin with numbers. Returns the bytes of all tensors."""
    config = LlamaConfig(**CONFIG, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    build_tokenizer(STORED_TOKENS).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    names = list(shapes)
    parts = [names[i::SHARDS] for i in range(SHARDS)]
    weight_map, total = {}, 0
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        entries, end = {}, 0
        for name in part:
            begin, end = end, end + 2 * torch.Size(shapes[name]).numel()
            entries[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            weight_map[name] = file
        header = json.dumps(entries).encode()
        with (folder / file).open("wb") as target:
            target.write(len(header).to_bytes(8, "little") + header)
            for name in part:
                if "embed" in name or "lm_head" in name:
                    target.seek(8 + len(header) + entries[name]["data_offsets"][0])
                    rows = torch.randn(60, HIDDEN).bfloat16()
                    target.write(rows.view(torch.uint8).numpy().tobytes())
            target.truncate(8 + len(header) + end)
        total += end
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads and limits memory as Linux does")
def test_checkpoint_larger_than_the_memory_passes(tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir()
    total = write_sparse(src)
    assert total > 2 * GIB > 6 * ALLOWED
    assert sum(path.stat().st_blocks for path in src.iterdir()) * 512 < 2**24
    flags = ["--rope-type", "yarn", "--factor", "4", "--add-token", "<tool>", "--pad-to-multiple-of", "4096"]
    command = [sys.executable, "-c", RUN, str(ALLOWED), "extend", str(src), str(dst), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        imports, more = map(int, re.search(r"bytes of memory: (\d+) (\d+)", done.stdout).groups())
        assert more < ALLOWED, f"{more / GIB:.2f} GiB beyond the imports' {imports / GIB:.2f} GiB"
        assert re.search(r"(\d\.\d)/\1 GB", done.stderr), "no progress bar was shown"
        tensors = {}
        for path in sorted(dst.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_slice(name).get_shape() for name in file.keys()}
        assert len(tensors) == 9 * LAYERS + 3
        assert tensors["lm_head.weight"] == tensors["model.embed_tokens.weight"] == [4096, HIDDEN]
    finally:
        shutil.rmtree(dst, ignore_errors=True)  # whole gigabytes where the file system copies holes as zeros
