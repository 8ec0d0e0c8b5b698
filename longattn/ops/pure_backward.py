"""Banded attention backward in PyTorch: probabilities are formed again tile by tile from the saved log-sum-exp.

With P = exp(S - lse) and D = rowsum(dO * O) - dlse:
dV = P^T dO,  dS = P * (dO V^T - D),  dQ = scale dS K,  dK = scale dS^T Q
(Dao et al., 2022, arXiv:2205.14135, algorithm 4); a sink logit z gets sum exp(z - lse) * -D. On the CPU one fused call
serves a run; elsewhere, with a soft cap, and with a gradient of the log-sum-exp the products are explicit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longattn.ops.layout import empty_like_order
from longattn.ops.rows import Segment
from longattn.ops.scores import SLAB, Job, Part, accumulate_dtype, is_fused, is_low, narrow_rows, parts, slab_logits
from longattn.ops.tiles import Run, additive_mask
from longattn.ops.views import Heads, key_view, query_view, slabs

__all__ = ["backward"]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # grad_out, query, key, value, out, lse
Index = tuple[int | slice, ...]


def backward(
    inputs: Inputs, grad_lse: Tensor | None, job: Job, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sink_logits (empty where there are none).

    Args:
        inputs: grad_out, query, key, value, out, lse, as `forward` takes and returns them; the last dims contiguous.
        grad_lse: (B, Hq, Sq), or None for zero.
    """
    grad_out, query, key, value, out, lse = inputs
    fused = is_fused(query, job) and grad_lse is None
    dq, dk, dv = (empty_like_order(x).zero_() for x in (query, key, value))
    delta = None if fused and sink_logits is None else _delta(grad_out, out, grad_lse, lse.dtype)
    for part in parts(job, query, key, _block_rows(fused)):
        for few in _few_heads(part, query, key):
            _part_backward(few, inputs, None if fused else delta, (dq, dk, dv), job)
    if sink_logits is None or delta is None:
        return dq, dk, dv, query.new_empty(0)
    total = lse.masked_fill(lse == -torch.inf, 0.0)
    weight = (sink_logits.to(lse.dtype)[None, :, None] - total).exp_()
    return dq, dk, dv, -(weight * delta).sum((0, 2)).to(sink_logits.dtype)


def _block_rows(fused: bool) -> int:
    """Rows of a sliding tile: tall tiles overlap less, and what overlaps is added up outside the fused call."""
    return 192 if fused else 64


def _delta(grad_out: Tensor, out: Tensor, grad_lse: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rowsum(grad_out * out) - grad_lse: (B, Hq, Sq), a head at a time to hold no product of the output's size."""
    delta = torch.empty(out.shape[:3], dtype=dtype, device=out.device)
    for head in range(out.shape[1]):
        delta[:, head] = (grad_out[:, head].to(dtype) * out[:, head].to(dtype)).sum(-1)
    return delta if grad_lse is None else delta.sub_(grad_lse)


def _few_heads(part: Part, query: Tensor, key: Tensor) -> list[Part]:
    """A part cut to one batch row, and to so few KV heads that accumulators of their size do not add up."""
    heads, (b0, b1) = part.heads, part.segment.batch
    most = heads.count
    if heads.key_step and is_low(query.dtype):
        most = max(1, key.shape[0] * key.shape[1] // 8)
    few = [heads.part(h, min(most, heads.count - h)) for h in range(0, heads.count, most)]
    rows = [replace(part.segment, batch=(b, b + 1)) for b in range(b0, b1)]
    return [replace(part, segment=segment, heads=some) for segment in rows for some in few]


def _part_backward(
    part: Part, inputs: Inputs, delta: Tensor | None, grads: tuple[Tensor, Tensor, Tensor], job: Job
) -> None:
    """Add one part's share to the gradients; keys and values in the accumulation dtype first."""
    dq, dk, dv = grads
    keys = [_heads_of(x, part.segment, part.heads) for x in (dk, dv)]
    dtype = accumulate_dtype(dk.dtype)
    sums = keys if dk.dtype == dtype else [x.to(dtype) for x in keys]
    for run in part.runs:
        if delta is None:
            _fused(part, run, inputs, dq, sums, job)
        else:
            for narrow in run.narrowed(min(64, narrow_rows(run))):
                _explicit(part, narrow, inputs, delta, dq, sums, job)
    if dk.dtype != dtype:
        for kept, total in zip(keys, sums, strict=True):
            kept.copy_(total)


def _heads_of(x: Tensor, segment: Segment, heads: Heads) -> Tensor:
    """The part of x (B, Hkv, Sk, D) that a part's keys are: (KV heads, keys, D)."""
    last = heads.key + (heads.count - 1) * heads.key_step + 1
    return x[segment.batch[0], heads.key : last, segment.key[0] : segment.key[1]]


def _fused(part: Part, run: Run, inputs: Inputs, dq: Tensor, sums: list[Tensor], job: Job) -> None:
    """One run through PyTorch's own CPU flash backward, some tiles at a time: each tile's dK and dV come apart."""
    query = inputs[1]
    num_rows = query.shape[0] * query.shape[1] * query.shape[2]
    # rows of dq, dk and dv in a call; for low dtypes PyTorch holds them in float32 as well
    budget = max(num_rows // (12 if is_low(query.dtype) else 2), 1 << 14)
    most = max(1, budget // (part.heads.count * (run.rows + 2 * run.cols)))
    mask = additive_mask(run, query.dtype, query.device)
    segment, heads = part.segment, part.heads
    for start in range(0, run.count, most):
        piece = run.tiles(start, min(most, run.count - start))
        g, q, o, m, to = (
            query_view(x, segment.batch, heads, segment.query[0], piece)[0]
            for x in (inputs[0], query, inputs[4], inputs[5], dq)
        )
        k, v = (key_view(x, segment.batch, heads, segment.key[0], piece)[0] for x in (inputs[2], inputs[3]))
        share_q, share_k, share_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, m, 0.0, run.kind == "triangle", attn_mask=mask, scale=job.scale
        )
        if run.prefix:
            to.add_(share_q)
        else:
            to.copy_(share_q)
        for total, share in zip(sums, (share_k, share_v), strict=True):  # (heads, tiles, cols, D)
            for head in range(len(share)):
                _add(total, share[head], piece, (0, head, slice(0, piece.count)))


def _explicit(part: Part, run: Run, inputs: Inputs, delta: Tensor, dq: Tensor, sums: list[Tensor], job: Job) -> None:
    """One run by batched products of slabs, in the accumulation dtype."""
    segment, heads = part.segment, part.heads
    rows = (query_view(x, segment.batch, heads, segment.query[0], run) for x in (*inputs[:2], inputs[5], delta, dq))
    grad_out, query, lse, deltas, to = rows
    keys, values = (key_view(x, segment.batch, heads, segment.key[0], run) for x in (inputs[2], inputs[3]))
    for index in slabs(query.shape[:3], max(1, SLAB // (run.rows * run.cols))):
        g, q, k, v = (x[index].to(delta.dtype) for x in (grad_out, query, keys, values))
        logits, slope = slab_logits(part, run, index, q, k, job)
        total = lse[index].masked_fill(lse[index] == -torch.inf, 0.0)
        # at most 1: large logits differ from their log-sum-exp by rounding
        weights = logits.sub_(total[..., None]).clamp_(max=0).exp_()  # (slab, rows, cols)
        dlogits = torch.bmm(g, v.transpose(1, 2)).sub_(deltas[index][..., None]).mul_(weights)
        if slope is not None:
            dlogits.mul_(slope)
        share_q = torch.bmm(dlogits, k).mul_(job.scale)
        to[index].copy_(to[index] + share_q if run.prefix else share_q)
        _add(sums[0], torch.bmm(dlogits.transpose(1, 2), q).mul_(job.scale), run, index)
        _add(sums[1], torch.bmm(weights.transpose(1, 2), g), run, index)


def _add(total: Tensor, share: Tensor, run: Run, index: Index) -> None:
    """Add the share (slab, cols, D) of the tiles at `index` to (KV heads, keys, D), step by step where they overlap."""
    _, head, tile = index
    if isinstance(head, slice):
        assert isinstance(tile, int)
        first = run.key + tile * run.key_step
        goal = total[head if len(total) > 1 else slice(0, 1), first : first + run.cols]
        goal.add_(share if len(total) > 1 else share.sum(0, keepdim=True))
        return
    one = total[head if len(total) > 1 else 0]  # (keys, D)
    start = tile.start if isinstance(tile, slice) else tile
    if len(share) == 1:
        first = run.key + start * run.key_step
        one[first : first + run.cols].add_(share[0])
        return
    width = run.key_step
    for col in range(0, run.cols, width):
        cols = min(width, run.cols - col)
        size, stride = (len(share), cols, share.shape[2]), (width * one.stride(0), one.stride(0), one.stride(1))
        offset = one.storage_offset() + (run.key + start * width + col) * one.stride(0)
        one.as_strided(size, stride, offset).add_(share[:, col : col + cols])
