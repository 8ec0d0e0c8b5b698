"""Train the small Llamas that the experiment extends, one a seed, from scratch, and write them as checkpoints.

    OMP_NUM_THREADS=1 python benchmarks/experiment/bases.py --out bases

The recall task of `corpus.py` comes first, alone and in short rows; then half of the rows are text of the standard
library and half have the task among it. The context is 256 tokens: below that, YaRN's default of 32 rotations leaves no
frequency unscaled. Start it once a core: each takes seeds that no other has taken, and a run that was ended goes on
from its last checkpoint. `training.json` beside each model records the text, the losses and its recall at its length.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from corpus import Ids, dense_rows, documents, text_facts, token_stream, train_tokenizer, training_rows
from scores import recall, text_perplexity, text_windows
from taking import taken
from transformers import LlamaConfig, LlamaForCausalLM
from tuning import objective, row_losses

DENSE_PART = 4  # of the length, for rows without text, from which recall is learnt in a minute; among text it is not
SAVE_EVERY = 200


def build_model(args: argparse.Namespace, tokenizer: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 32,
        head_dim=32,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, stream: torch.Tensor, ids: Ids, seed: int, args: argparse.Namespace) -> dict:
    """AdamW, warmed up and cosine-decayed; goes on from `args.out`/seed-N.part, and returns the mean losses by step."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    part = args.out / f"seed-{seed}.part"
    state: dict[str, Any] = {"step": 0, "losses": [], "seconds": 0.0}
    if part.exists():
        state = torch.load(part, weights_only=True)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    began = time.process_time() - state["seconds"]
    model.train()
    for step in range(state["step"], args.steps):
        # a generator of the step's own, so that a run that goes on draws what one that was not ended draws
        draw = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        dense = step < args.dense_steps
        half = step < args.dense_steps + args.half_steps
        length = args.length // (DENSE_PART if dense else 2 if half else 1)
        warm = min(1.0, (step + 1) / 50)
        late = max(0, step - args.dense_steps) / max(1, args.steps - args.dense_steps)
        rate = args.dense_lr if dense else args.lr * (0.05 + 0.475 * (1 + math.cos(math.pi * late)))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm
        make = dense_rows if dense else training_rows
        rows = make(stream, ids, rows=args.tokens // length, length=length, draw=draw)
        each = row_losses(model, rows)
        answers = torch.isin(rows[:, 1:], ids.values)
        loss = each[answers].mean() if dense else objective(each, rows, ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state["losses"].append(each.mean().item())
        if (step + 1) % args.say_every == 0:
            found = recall(model, stream, ids, length=length, rows=16)
            model.train()
            mean = sum(state["losses"][-args.say_every :]) / args.say_every
            print(
                f"seed {seed} step {step + 1}/{args.steps} loss {mean:.3f} recall {found['accuracy']:.2f} "
                f"{time.process_time() - began:.0f} s of processor time",
                flush=True,
            )
        if (step + 1) % SAVE_EVERY == 0:
            state |= {"step": step + 1, "seconds": time.process_time() - began}
            torch.save({**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, part)
    means = range(100, args.steps + 1, 100)
    return {
        "processor_seconds": round(time.process_time() - began),
        "loss_means_of_100_steps": {end: round(sum(state["losses"][end - 100 : end]) / 100, 4) for end in means},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/experiment/bases"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--dense-steps", type=int, default=250, help="steps of facts and questions alone, at the start")
    parser.add_argument("--half-steps", type=int, default=100, help="steps at half the length after those")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--dense-lr", type=float, default=1e-3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32, help="held-out texts to score")
    parser.add_argument("--files", type=int, help="read so many files of each kind only")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--say-every", type=int, default=100)
    args = parser.parse_args(argv)

    torch.set_num_threads(1)  # the numbers don't depend on the cores
    trained, scored = documents(args.files)
    tokenizer = train_tokenizer(trained, args.vocab)
    tokenizer.model_max_length = args.length
    stream, held_out = token_stream(trained, tokenizer), token_stream(scored, tokenizer)
    windows = text_windows(scored, tokenizer, length=args.length, count=args.windows)
    text = {**text_facts(trained, scored), "tokens_in_trained_files": len(stream)}
    for seed in args.seeds:
        with taken(args.out / f"seed-{seed}" / "training.json") as mine:
            if mine:
                _make(seed, stream, held_out, windows, text, tokenizer, args)


def _make(
    seed: int,
    stream: torch.Tensor,
    held_out: torch.Tensor,
    windows: torch.Tensor,
    text: dict[str, Any],
    tokenizer: Any,
    args: argparse.Namespace,
) -> None:
    """Train a base, score it, and write it to a folder of its own, the record last."""
    folder, ids = args.out / f"seed-{seed}", Ids.of(tokenizer)
    torch.manual_seed(seed)
    model = build_model(args, tokenizer)
    print(f"seed {seed}: {model.num_parameters():,} parameters", flush=True)
    history = train(model, stream, ids, seed, args)
    record = {
        "command": f"python benchmarks/experiment/bases.py --seeds {seed} --steps {args.steps} "
        f"--dense-steps {args.dense_steps} --half-steps {args.half_steps} --tokens {args.tokens} "
        f"--dense-lr {args.dense_lr} --lr {args.lr} --hidden {args.hidden} --layers {args.layers} "
        f"--vocab {args.vocab}",
        **text,
        "tokens_trained": args.steps * args.tokens,
        "parameters": model.num_parameters(),
        "perplexity": text_perplexity(model, windows, args.length),
        "recall": recall(model, held_out, ids, length=args.length, rows=64),
        **history,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / f"seed-{seed}.part").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
