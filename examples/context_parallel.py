"""Train on sequences four times longer than a rank holds: `torchrun --nproc-per-node 2 examples/context_parallel.py`.

The demo's small Llama, extended to windows with sinks, learns Python source by AdamW under FSDP2. A rank "holds" as
many tokens as a plain training step keeps within its memory. Each sequence has four times as many, sharded over the cp
ranks, with gradient checkpointing where those are fewer than four; ranks beyond --cp train on other sequences (dp).
gloo serves CPUs, NCCL serves GPUs; across machines it starts as any torchrun script does.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, logging

import longattn
from longattn import distributed
from longattn.costs import activation_bytes
from longattn.demo import MODEL_FOLDER
from longattn.demo.finetune import token_stream
from longattn.demo.text import read_documents
from longattn.structure import decoder_of
from longattn.units import format_bytes

LONGER = 4
PATTERN = "window:256+sinks:4"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on sequences longer than a rank holds.")
    parser.add_argument("--holds", type=int, default=2048, help="tokens whose training step fits a rank's memory")
    parser.add_argument("--cp", type=int, default=0, help="ranks that share a sequence (default: all)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps")
    return parser.parse_args()


def extended(length: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demo's model, which has read 256 tokens at a time, ready for `length`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER), AutoTokenizer.from_pretrained(MODEL_FOLDER)
    rope = {"rope_type": "yarn", "factor": length / model.config.max_position_embeddings}
    longattn.extend(model, tokenizer, longattn.Plan(rope=rope, attention=PATTERN))
    return model.train(), tokenizer


def sequences(tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Tensor:
    """int64 (count, length): the standard library's sources, one after the other."""
    stream = token_stream(read_documents(scored=False), tokenizer, max_chars=4 * length * count)
    return stream[: length * count].view(count, length)


def needs_checkpointing(model: PreTrainedModel, holds: int, tokens: int) -> bool:
    """Whether a rank's tokens fit its memory only with gradient checkpointing."""
    decoder = decoder_of(model.config, training=True)
    memory = activation_bytes(decoder, holds)
    if activation_bytes(decoder, tokens) <= memory:
        return False
    needed = activation_bytes(decoder, tokens, checkpointing=True)
    if needed > memory:
        raise SystemExit(
            f"a rank holds {format_bytes(memory)} of activations, its {tokens} tokens need {format_bytes(needed)}: "
            "give more ranks"
        )
    return True


def sharded(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Sequences over the mesh's cp ranks, parameters over all of them."""
    distributed.parallelize(model.to(mesh.device_type), mesh["cp"])
    both = mesh["dp", "cp"]._flatten("dp_cp")
    for layer in model.model.layers:
        fully_shard(layer, mesh=both)
    return fully_shard(model, mesh=both)


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: Tensor, mesh: DeviceMesh) -> float:
    """One step on a sequence for each dp rank; returns the loss of all."""
    ids = batch[mesh["dp"].get_local_rank()][None]
    shard = distributed.shard_batch({"input_ids": ids, "labels": ids}, mesh["cp"])
    shard["num_items_in_batch"] *= len(batch)  # all sequences are equally long
    loss = model(**{name: x.to(model.device) for name, x in shard.items()}, use_cache=False).loss
    (loss * mesh.size()).backward()  # FSDP averages over all ranks, whose losses add up
    optimizer.step()
    optimizer.zero_grad()
    whole = loss.detach().clone()
    dist.all_reduce(whole)
    return float(whole)


def main() -> None:
    options = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    say = print if rank == 0 else lambda text: None
    cp, length = options.cp or world, LONGER * options.holds
    mesh = init_device_mesh(device, (world // cp, cp), mesh_dim_names=("dp", "cp"))
    model, tokenizer = extended(length)
    checkpointing = needs_checkpointing(model, options.holds, -(-length // cp))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    say(
        f"{length} tokens a sequence, {LONGER} times the {options.holds} that a rank holds: {-(-length // cp)} on each "
        f"of {cp} ranks{', with checkpointing' if checkpointing else ''}; {world // cp} at a time"
    )
    model = sharded(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    batches = sequences(tokenizer, length, options.steps * (world // cp)).split(world // cp)
    start = time.perf_counter()
    with distributed.count_traffic() as traffic:
        for number, batch in enumerate(batches):
            say(f"step {number}: loss {step(model, optimizer, batch, mesh):.5f}")
    seconds = time.perf_counter() - start
    rows: list[tuple[float, ...]] = [()] * world
    mine = (traffic.sent_bytes / options.steps, traffic.seconds / options.steps, length / cp * options.steps / seconds)
    dist.all_gather_object(rows, mine)
    for number, (sent, waited, rate) in enumerate(rows):
        say(f"rank {number}: a step sent {sent:,.0f} bytes and waited {waited:.3f} s for them; {rate:,.0f} tokens/s")
    dist.barrier()  # a rank that leaves while another still works may abort
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo outlive its groups, and may abort an interpreter that ends


if __name__ == "__main__":
    main()
