"""What ranks compute in the tests of sharded attention, beside the dense reference of the whole sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from reference import FLOOR, dense, finite, half_shifts, visible_mask
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map
from torch.utils.checkpoint import checkpoint

from longattn import distributed

Case = dict[str, Any]


def equal(tokens: int, ranks: int) -> list[int]:
    """Shards as even as they can be."""
    return [rank * tokens // ranks for rank in range(ranks + 1)]


def inputs(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """query, key, value, and the gradients of out and lse: whole, the same on every rank."""
    batch, heads, kv_heads, tokens = case.get("batch", 1), case.get("heads", 4), case.get("kv", 2), case["tokens"]
    generator = torch.Generator().manual_seed(case.get("seed", 0))
    shapes = [(batch, h, tokens, 8) for h in (heads, kv_heads, kv_heads, heads)] + [(batch, heads, tokens)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def call(case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, group: Any, offsets: Any) -> Any:
    """The sharded function on a rank's shards."""
    shared = dict(
        group=group,
        offsets=offsets,
        softcap=case.get("softcap", 0.0),
        sink_tokens=case.get("sinks", 0),
        sink_logits=sinks,
        return_lse=True,
    )
    for name in ("cu_seqlens", "kv_start"):
        if case.get(name) is not None:
            shared[name] = torch.tensor(case[name], dtype=torch.int32)
    if "group" in case:
        more = dict(shift=case.get("shift", 0), causal=case.get("causal", True))
        return distributed.group_attention(q, k, v, case["group"], **more, **shared)
    return distributed.window_attention(q, k, v, case["window"], **shared)


def reference(case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    if "group" in case:
        shifts = half_shifts(heads, case.get("shift", 0))
        band = dict(group=case["group"], shifts=shifts, causal=case.get("causal", True))
    else:
        window = case["window"]
        band = dict(window=window if isinstance(window, tuple) else (window - 1, 0))
    for name in ("cu_seqlens", "kv_start"):
        if case.get(name) is not None:
            band[name] = torch.tensor(case[name], dtype=torch.int32)
    mask = visible_mask(q.shape[0], heads, q.shape[2], k.shape[2], sinks=case.get("sinks", 0), **band)
    return dense(q, k, v, mask, softcap=case.get("softcap", 0.0), sink_logits=sinks)


def errors(group: dist.ProcessGroup, case: Case, attend: Callable[..., Any] = call) -> dict[str, float]:
    """Relative errors, over all ranks, of out, lse, and the gradients of query, key, value and the sink logits."""
    q, k, v, grad_out, grad_lse = inputs(case)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    offsets = case.get("offsets") or equal(q.shape[2], ranks)
    own = slice(offsets[rank], offsets[rank + 1])
    sinks = torch.linspace(-1, 1, q.shape[1], dtype=torch.float64) if case.get("logits") else None

    def run(f: Callable[..., Any], part: slice) -> list[Tensor]:
        leaves = [x[:, :, part].detach().clone().requires_grad_() for x in (q, k, v)]
        leaves += [] if sinks is None else [sinks.clone().requires_grad_()]
        out, lse = f(*leaves, *([None] if sinks is None else []))
        loss = (out * grad_out[:, :, part]).sum() + (finite(lse) * grad_lse[:, :, part]).sum()
        return [out.detach(), finite(lse.detach()), *torch.autograd.grad(loss, leaves)]

    expected = run(lambda *x: reference(case, *x), slice(None))
    given = None if case.get("offsets") is None and q.shape[2] % ranks == 0 else offsets
    got = run(lambda *x: attend(case, *x, group, given), own)
    names = ["out", "lse", "query", "key", "value", "sink_logits"]
    found = {}
    for name, a, b in zip(names, got, expected, strict=False):
        if name == "sink_logits":
            dist.all_reduce(a, group=group)
        else:
            b = b[:, :, own]
        found[name] = [float((a - b).norm() ** 2), float(b.norm() ** 2)]
    table = torch.tensor(list(found.values()), dtype=torch.float64)
    dist.all_reduce(table, group=group)
    return dict(zip(found, (table[:, 0].sqrt() / table[:, 1].sqrt()).tolist(), strict=True))


def compiled_errors(group: dist.ProcessGroup, case: Case) -> dict[str, float]:
    """As `errors`, in one graph."""
    torch._dynamo.reset()

    def attend(case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, group: Any, offsets: Any) -> Any:
        run = torch.compile(lambda *x: call(case, *x, group, offsets), fullgraph=True, backend="aot_eager")
        return run(q, k, v, sinks)

    return errors(group, case, attend)


def op_check(group: dist.ProcessGroup, case: Case) -> dict[str, str]:
    """torch.library.opcheck of the torch op on every rank at once."""
    q, k, v, *_ = inputs(case)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    length = q.shape[2] // ranks
    q, k, v = (x[:, :, rank * length :][:, :, :length].clone().requires_grad_() for x in (q, k, v))
    sinks = torch.zeros(q.shape[1], dtype=q.dtype, requires_grad=True)
    positions = torch.arange(rank * length, (rank + 1) * length)[None]
    rest = ([], group.group_name, 0.3, 0.0, 2, sinks, None, None, positions)
    if "group" in case:
        op, band = (
            torch.ops.longattn.sharded_group_attention,
            (case["group"], [0, 0, case["shift"], case["shift"]], True),
        )
    else:
        op, band = torch.ops.longattn.sharded_window_attention, (case["window"], 0)
    return torch.library.opcheck(op.default, (q, k, v, *band, *rest))


def fake_devices(group: dist.ProcessGroup, case: Case) -> list[str]:
    """Devices of outputs and gradients where the shards are on a GPU, as a compiler sees them: no GPU is needed."""
    band = ("group", (16, [0, 0, 8, 8], True)) if "group" in case else ("window", (case["window"], 0))
    forward = getattr(torch.ops.longattn, f"sharded_{band[0]}_attention").default
    backward = getattr(torch.ops.longattn, f"sharded_{band[0]}_attention_bwd").default
    with FakeTensorMode(), torch.no_grad():
        shards = [torch.empty(1, heads, 15, 8, device="cuda") for heads in (4, 2, 2)]
        positions = torch.empty(1, 15, dtype=torch.long, device="cuda")
        options = (*band[1], [], group.group_name, 0.3, 0.0, case.get("sinks", 0), None, None, None, positions)
        out, lse, remote = forward(*shards, *options)
        grads = backward(out, None, *shards, out, lse, remote, *options)
        parts = torch.empty(2, 15, 1, 4, 8, device="cuda")
        traded = torch.ops.longattn.sharded_trade.default(parts, positions, None, group.group_name)
        return [str(x.device) for x in (out, lse, remote, *grads, traded)]


def trade_check(group: dist.ProcessGroup) -> dict[str, str]:
    """torch.library.opcheck of what full layers trade by."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    parts = torch.randn(ranks, 3, 2, 2, 8, requires_grad=True)
    positions = torch.arange(rank * 3, rank * 3 + 3)[None]
    return torch.library.opcheck(torch.ops.longattn.sharded_trade.default, (parts, positions, None, group.group_name))


def mesh_errors(group: dist.ProcessGroup, case: Case, kind: str) -> dict[str, float]:
    """On a 2 x 2 mesh: "dp x cp" has a batch of its own in each half, "cp x tp" half of the heads on each rank."""
    names = ("dp", "cp") if kind == "dp x cp" else ("cp", "tp")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    if kind == "dp x cp":
        local = errors(mesh["cp"].get_group(), {**case, "seed": mesh["dp"].get_local_rank()}, _on_mesh(mesh["cp"]))
        worst = torch.tensor(list(local.values()))
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return dict(zip(local, worst.tolist(), strict=True))
    q, k, v, grad_out, _ = inputs(case)
    expected = [x.clone().requires_grad_() for x in (q, k, v)]
    ref, _ = reference(case, *expected, None)
    grads = torch.autograd.grad(ref, expected, grad_out)
    placed = (Shard(2), Shard(1))
    leaves = [distribute_tensor(x, mesh, placed).requires_grad_() for x in (q, k, v)]
    heads = slice(mesh["tp"].get_local_rank() * 2, mesh["tp"].get_local_rank() * 2 + 2)
    shifts = half_shifts(4, case["shift"])[heads]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return distributed.group_attention(q, k, v, case["group"], shift=shifts, group=mesh["cp"])

    out = local_map(attend, out_placements=list(placed), in_placements=(list(placed),) * 3, device_mesh=mesh)(*leaves)
    got = torch.autograd.grad(out, leaves, distribute_tensor(grad_out, mesh, placed))
    pairs = dict(out=(out.full_tensor(), ref), query=(got[0].full_tensor(), grads[0]))
    pairs |= dict(key=(got[1].full_tensor(), grads[1]), value=(got[2].full_tensor(), grads[2]))
    return {name: float((a - b).norm() / b.norm()) for name, (a, b) in pairs.items()}


def _on_mesh(mesh: DeviceMesh) -> Callable[..., Any]:
    return lambda case, q, k, v, sinks, group, offsets: call(case, q, k, v, sinks, mesh, offsets)


def low_precision(group: dist.ProcessGroup, case: Case, dtype: torch.dtype) -> list[float]:
    """Errors over all ranks of out and the gradients, each over what the project allows."""
    whole = inputs(case, torch.float64)
    q, k, v, grad_out, _ = (x.to(dtype) for x in whole)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    offsets = equal(q.shape[2], ranks)
    own = slice(offsets[rank], offsets[rank + 1])

    def run(f: Callable[..., Any], tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = f(*leaves)[0]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    got = run(lambda *x: call(case, *x, None, group, offsets), [x[:, :, own] for x in (q, k, v)], grad_out[:, :, own])
    ref = run(lambda *x: reference(case, *x, None), [x.double() for x in (q, k, v)], grad_out.double())
    table = torch.stack([((a.double() - b[:, :, own]).norm() ** 2) for a, b in zip(got, ref, strict=True)])
    dist.all_reduce(table, group=group)
    return [float(e.sqrt() / (FLOOR[dtype] * b.norm())) for e, b in zip(table, ref, strict=True)]


def same_bits(group: dist.ProcessGroup, case: Case) -> bool:
    """Whether two runs give the same gradients, bit for bit."""
    q, k, v, grad_out, _ = inputs(case, torch.float32)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    offsets = equal(q.shape[2], ranks)
    own = slice(offsets[rank], offsets[rank + 1])
    runs = []
    for _ in range(2):
        leaves = [x[:, :, own].clone().requires_grad_() for x in (q, k, v)]
        out, _ = call(case, *leaves, None, group, offsets)
        runs.append([out, *torch.autograd.grad(out, leaves, grad_out[:, :, own])])
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def no_gradients(group: dist.ProcessGroup, case: Case) -> bool:
    """Whether a forward under no_grad and one that is checkpointed give what a plain one does."""
    q, k, v, *_ = inputs(case)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    length = q.shape[2] // ranks
    leaves = [x[:, :, rank * length :][:, :, :length].clone().requires_grad_() for x in (q, k, v)]

    def attend(*x: Tensor) -> Tensor:
        return call(case, *x, None, group, None)[0]

    out = attend(*leaves)
    expected = torch.autograd.grad(out.square().sum(), leaves)
    with torch.no_grad():
        same = torch.equal(attend(*leaves), out)
    for reentrant in (False, True):
        again = [x.detach().clone().requires_grad_() for x in leaves]
        checkpoint(attend, *again, use_reentrant=reentrant).square().sum().backward()
        same = same and all(torch.equal(x.grad, y) for x, y in zip(again, expected, strict=True))
    return same


@contextlib.contextmanager
def bytes_sent() -> Iterator[list[list[int]]]:
    """Collect, call by call, the bytes that this rank hands to `all_to_all_single` for each rank; they are sent too."""
    calls: list[list[int]] = []
    real = dist.all_to_all_single

    def counted(output: Tensor, rows: Tensor, received: Any, sent: list[int], **options: Any) -> Any:
        row = rows[:1].numel() * rows.element_size() if len(rows) else 0
        calls.append([row * count for count in sent])
        return real(output, rows, received, sent, **options)

    dist.all_to_all_single = counted
    try:
        yield calls
    finally:
        dist.all_to_all_single = real


def sent_bytes(group: dist.ProcessGroup, case: Case, dtype: torch.dtype = torch.float32) -> list[list[list[int]]]:
    """Bytes that this rank sent to each other rank, forward and backward, as the collective was asked to."""
    q, k, v, grad_out, _ = inputs(case, dtype)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    length = q.shape[2] // ranks
    leaves = [x[:, :, rank * length :][:, :, :length].clone().requires_grad_() for x in (q, k, v)]
    with bytes_sent() as sent, distributed.count_traffic() as traffic:
        out, _ = call(case, *leaves, None, group, None)
        forward = list(sent)
        out.sum().backward()
    assert traffic.sent_bytes == sum(sum(one) for one in sent) and traffic.seconds > 0
    assert traffic.messages == sum(bool(size) for one in sent for size in one)
    assert traffic.control_bytes == 2 * 8 * (ranks - 1)
    return [forward, sent[len(forward) :]]
