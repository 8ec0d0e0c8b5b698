"""Train the small Llama that `longattn demo` changes, and write it as a transformers checkpoint.

    OMP_NUM_THREADS=1 python benchmarks/train_demo_model.py --out longattn/demo/model

A byte is a token, so nothing has to be fetched: the text is the standard library's own sources, less the files that
`longattn.demo.text` holds out for scoring. The context is 256 tokens: below that, YaRN's default of 32 rotations
leaves no frequency unscaled, and its difference from plain interpolation would not show. Beside the checkpoint,
`training.json` records the command, the losses and the versions. About twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longattn.demo.text import read_documents

CONTEXT = 256
END_OF_TEXT = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 0 to 255 are the bytes themselves; it merges nothing and gives back every text."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # the ByteLevel pre-tokenizer writes the other bytes as the characters from 256 on
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocab_size: int, eos_token_id: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, data: Tensor, args: argparse.Namespace) -> dict[int, float]:
    """AdamW on random windows of `data` (N,), warmed up and cosine-decayed; returns the mean losses by step."""
    draw = torch.Generator().manual_seed(args.seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    losses: list[float] = []
    history: dict[int, float] = {}
    started = time.perf_counter()
    model.train()
    for step in range(args.steps):
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps)))
        starts = torch.randint(0, len(data) - CONTEXT, (args.batch,), generator=draw).tolist()
        ids = torch.stack([data[start : start + CONTEXT] for start in starts])  # (batch, CONTEXT)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            mean = sum(losses[-100:]) / len(losses[-100:])
            history[step + 1] = round(mean, 4)
            print(f"step {step + 1}/{args.steps} loss {mean:.4f} {time.perf_counter() - started:.0f} s", flush=True)
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("longattn/demo/model"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 tokens a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    encoded = [[*doc.text.encode(), end] for doc in read_documents(scored=False)]
    data = torch.tensor([token for document in encoded for token in document])  # (N,)
    model = build_model(len(tokenizer), end)
    print(f"{len(encoded)} files, {len(data):,} tokens, {model.num_parameters():,} parameters", flush=True)
    history = train(model, data, args)

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {
        "command": f"python benchmarks/train_demo_model.py --steps {args.steps} --batch {args.batch} --lr {args.lr} "
        f"--seed {args.seed}",
        "date": date.today().isoformat(),
        "files": len(encoded),
        "tokens_in_files": len(data),
        "tokens_trained": args.steps * args.batch * CONTEXT,
        "parameters": model.num_parameters(),
        "final_loss": history[args.steps],
        "loss_means_of_100_steps": history,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
