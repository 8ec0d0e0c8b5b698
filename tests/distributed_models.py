"""Whole models whose sequence is sharded, beside the same models in one process."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from hf_models import VOCAB, build, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from longattn import distributed
from longattn.distributed.style import shards_of
from longattn.hf.families import attention_modules
from longattn.plan import Plan
from longattn.surgery import extend

PLAN = Plan(attention="window:9+sinks:2, group:6+shift, full, window:30")


def changed(family: str, plan: Plan = PLAN) -> nn.Module:
    model = build(family)
    extend(model, None, plan)
    return model.train()


def whole_batch(rows: int, length: int, documents: list[int] | None = None) -> dict[str, Tensor]:
    ids = tokens(rows, length)
    labels = ids.clone()
    labels[:, :5] = -100
    batch = dict(input_ids=ids, labels=labels)
    if documents is not None:
        starts = torch.zeros(length, dtype=torch.long)
        for first, stop in zip(documents, documents[1:], strict=False):
            starts[first:stop] = torch.arange(stop - first)
            labels[:, first] = -100
        batch["position_ids"] = starts[None].expand(rows, -1)
    return batch


def adapted(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, lora).double()


@functools.cache
def meshes(group: dist.ProcessGroup, dp: int) -> tuple[DeviceMesh, DeviceMesh]:
    """The mesh of a sequence's ranks, and that of all."""
    if dp == 1:  # the group may be a part of the world, which all of the world would have to cut
        mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
        return mesh, mesh
    mesh = init_device_mesh("cpu", (dp, dist.get_world_size(group) // dp), mesh_dim_names=("dp", "cp"))
    return mesh["cp"], mesh["dp", "cp"]._flatten("dp_cp")


def compare(
    group: dist.ProcessGroup,
    family: str = "llama",
    *,
    dp: int = 1,
    length: int = 48,
    documents: list[int] | None = None,
    full: str = "gather",
    checkpointing: str = "",
    lora: bool = False,
    by_style: bool = False,
    compiled: bool = False,
) -> dict[str, float]:
    """Relative errors of the loss and of all gradients of a step with FSDP2 over dp x cp ranks."""
    cp = dist.get_world_size(group) // dp
    expected = changed(family)
    model = copy.deepcopy(expected)
    if lora:
        expected, model = adapted(expected), adapted(model)
    batch = whole_batch(dp, length, documents)
    loss = expected(**batch, use_cache=False).loss
    loss.backward()
    loss = loss.detach()

    across_cp, both = meshes(group, dp)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    base = model.base_model.model if lora else model
    if by_style:
        parallelize_module(model, across_cp, {"model.layers.*.self_attn": distributed.ContextParallel(full=full)})
    else:
        distributed.parallelize(model, across_cp, full=full)
    if compiled:
        torch._dynamo.reset()
        base.model.compile(fullgraph=True, backend="aot_eager")
    else:
        for layer in base.base_model.layers:
            fully_shard(layer, mesh=both)
        fully_shard(model, mesh=both)
    row = dist.get_rank(group) // cp
    mine = {name: x[row : row + 1] for name, x in batch.items()}
    shard = distributed.shard_batch(mine, across_cp)
    dist.all_reduce(shard["num_items_in_batch"], group=group)
    shard["num_items_in_batch"] //= cp  # those of a row are known to all of its ranks
    out = model(**shard, use_cache=False)
    (out.loss * (1 if compiled else dp * cp)).backward()
    total = out.loss.detach().clone()
    dist.all_reduce(total, group=group)
    errors = {"loss": float((total - loss).abs() / loss.abs())}
    size = max(float(p.grad.norm()) for p in expected.parameters() if p.grad is not None)
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
            continue
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        if compiled:
            dist.all_reduce(grad, group=group)
        errors[name] = float((grad - q.grad).norm()) / max(float(q.grad.norm()), 1e-2 * size)
    assert len(errors) > 4
    return errors


def refusals(group: dist.ProcessGroup, how: str) -> str:
    """What a rank hears of a wrong batch or model."""
    model = changed("llama")
    batch: dict[str, Any] = whole_batch(2, 48)
    try:
        if how == "stock":
            distributed.parallelize(build("llama"), group)
        distributed.parallelize(model, group)
        if how == "other batches":
            batch["input_ids"] = (batch["input_ids"] + dist.get_rank(group)) % VOCAB
        if how == "left padding":
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, :3] = 0
        if how == "packed rows":
            batch["position_ids"] = whole_batch(2, 48, [0, 9, 48])["position_ids"]
        if how == "other tensors":
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        shard = distributed.shard_batch(batch, group)
        if how == "no positions":
            del shard["position_ids"]
        if how == "zig-zag":
            chunks = torch.arange(48).chunk(2 * dist.get_world_size(group))
            rank = dist.get_rank(group)
            shard["position_ids"] = torch.cat([chunks[rank], chunks[-1 - rank]])[None].expand(2, -1)
        if how == "mask":
            shard["attention_mask"] = torch.ones_like(shard["input_ids"])
            shard["attention_mask"][0, :3] = 0
        if how == "decoding":
            cache = model(**shard, use_cache=True).past_key_values
            model(shard["input_ids"][:, -1:], past_key_values=cache)
        else:
            model(**shard, use_cache=False)
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing"


def released(group: dist.ProcessGroup) -> bool:
    """Whether a released model gives what it gave before."""
    model = changed("llama").eval()
    ids = tokens(1, 20)
    with torch.no_grad():
        before = model(ids).logits
        distributed.parallelize(model, group)
        distributed.release(model)
        return torch.equal(before, model(ids).logits)


def decoded(group: dist.ProcessGroup, family: str, attention: str | None, length: int, to: int) -> dict[str, Any]:
    """Prefill over the ranks and decode on one; beside the same in one process."""
    model = build(family)
    if attention is not None:
        extend(model, None, Plan(attention=attention))
    else:
        model.set_attn_implementation("longattn")
    model.eval()
    ids = tokens(2, length)
    distributed.parallelize(model, group)
    with distributed.count_traffic() as traffic:
        found = distributed.prefill(model, ids, group, to=to)
    if found is None:
        return {"sent": traffic.sent_bytes}
    distributed.release(model)
    logits, cache = found
    held = [layer.keys.shape[2] for layer in cache.layers]
    whole = model(ids, use_cache=True)
    longer = torch.cat([ids, logits.argmax(-1)[:, None]], dim=1)
    options = dict(max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None)
    got, expected = model.generate(longer, past_key_values=cache, **options), model.generate(longer, **options)
    return {
        "logits": float((logits - whole.logits[:, -1]).norm() / logits.norm()),
        "same tokens": torch.equal(got, expected),
        "held": held,
        "sent": traffic.sent_bytes,
    }


def prefill_refusal(group: dist.ProcessGroup, how: str) -> str:
    """What a rank hears of a prompt that is wrong on rank 1."""
    model, ids = changed("llama").eval(), tokens(2, 20)
    other = dist.get_rank(group) == 1
    if not (how == "not parallel" and other):
        distributed.parallelize(model, group)
    if how == "training" and other:
        model.train()
    if how == "another prompt" and other:
        ids = (ids + 1) % VOCAB
    try:
        distributed.prefill(model, ids, group, to=5 if how == "to" and other else 0)
    except ValueError as error:
        return str(error)
    return "nothing"


def deep_copy_shares_its_group(group: dist.ProcessGroup) -> bool:
    model = changed("llama")
    distributed.parallelize(model, group)
    again = copy.deepcopy(model)
    return all(shards_of(m).group == group.group_name for m in attention_modules(again))


def compiled_without_positions(group: dist.ProcessGroup) -> str:
    """What a rank hears when a compiled model is not given its positions."""
    model = changed("llama")
    distributed.parallelize(model, group)
    torch._dynamo.reset()
    model.model.compile(fullgraph=True, backend="aot_eager")
    shard = distributed.shard_batch(whole_batch(1, 16), group)
    del shard["position_ids"]
    try:
        model(**shard, use_cache=False)
    except ValueError as error:
        return str(error)
    return "nothing"


def traffic_of(group: dist.ProcessGroup, attention: str, length: int, full: str) -> dict[str, int]:
    """Bytes that this rank sends in a forward, and in a training step without and with checkpointing."""
    model = changed("llama", Plan(attention=attention))
    distributed.parallelize(model, group, full=full)
    shard = distributed.shard_batch(whole_batch(1, length), group)
    found = {}
    with distributed.count_traffic() as traffic, torch.no_grad():
        model(**shard, use_cache=False)
    found["forward"] = traffic.sent_bytes
    for name in ("training", "checkpointed"):
        if name == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with distributed.count_traffic() as traffic:
            model(**shard, use_cache=False).loss.backward()
        found[name] = traffic.sent_bytes
    return found
