"""One rank of a sharded training step, beside the same step unsharded: `torchrun fsdp_worker.py FOLDER`.

Each rank trains on its half of a batch. Rank 0 writes FOLDER/report.json, and the full state after a step of the
optimizer as the checkpoint FOLDER/model.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from hf_models import tokens
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_helpers import PLAN, assert_gradients_agree, extended, patterns_called

from longattn.hf.attention import calls_seen
from longattn.surgery import extend, restore

RANKS = 2
LENGTH = 20
POSITIONS = torch.tensor([[*range(5), *range(9), *range(6)]])
BORDERS = torch.tensor([0, 5, 14, 20], dtype=torch.int32)
PACKED = dict(cu_seq_lens_q=BORDERS, cu_seq_lens_k=BORDERS, max_length_q=9, max_length_k=9)


def shard(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batches(new_ids: list[int]) -> dict[str, dict]:
    """A row a rank: whole, packed, and left-padded in the first row."""
    ids = tokens(RANKS, LENGTH)
    ids[:, [3, 11]] = torch.tensor(new_ids)
    plain = dict(input_ids=ids, labels=ids, use_cache=False)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {
        "whole": plain,
        "packed": {**plain, "position_ids": POSITIONS.expand(RANKS, -1)},
        "padded": {**plain, "attention_mask": mask},
    }


def row_of(batch: dict, rank: int) -> dict:
    rows = {name: value[rank : rank + 1] if torch.is_tensor(value) else value for name, value in batch.items()}
    return {**rows, **PACKED} if "position_ids" in batch else rows


def step(model, batch: dict) -> torch.Tensor:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def refusal(call, model) -> str:
    try:
        call(model)
    except TypeError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    rank = dist.get_rank()
    whole, _, new_ids = extended()
    whole.train()
    model = shard(copy.deepcopy(whole), init_device_mesh("cpu", (RANKS,)))
    report: dict = {"steps": {}}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for name, batch in batches(new_ids).items():
            expected = step(whole, batch)
            with calls_seen() as calls:
                loss = step(model, row_of(batch, rank))
            dist.all_reduce(loss)
            got = {key: parameter.grad.full_tensor() for key, parameter in model.named_parameters()}
            assert_gradients_agree(got, {key: p.grad for key, p in whole.named_parameters()}, 1e-5)
            model.zero_grad()
            whole.zero_grad()
            called = [f"{layer}: {pattern}" for layer, pattern in sorted(patterns_called(calls).elements())]
            report["steps"][f"{name}, {checkpointing}"] = {
                "loss": float(loss) / RANKS,
                "expected": float(expected),
                "calls": called,
            }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, row_of(batches(new_ids)["whole"], rank))
    optimizer.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    report["refusals"] = [refusal(call, model) for call in (lambda m: extend(m, None, PLAN), restore)]
    if rank == 0:
        model.save_pretrained(folder / "model", state_dict=state)
        (folder / "report.json").write_text(json.dumps(report))
    dist.barrier()  # a rank that leaves while another still works may abort
    os._exit(0)  # and threads of gloo, which outlive its groups, may abort an interpreter that ends


if __name__ == "__main__":
    dist.init_process_group("gloo")
    try:
        main(Path(sys.argv[1]))
    finally:
        dist.destroy_process_group()
