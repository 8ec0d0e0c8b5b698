"""Banded attention forward in PyTorch: a fused call a run on the CPU, explicit products elsewhere or with a cap."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.ops.band import WindowBand
from longattn.ops.layout import empty_like_order
from longattn.ops.scores import (
    SLAB,
    Job,
    Part,
    accumulate_dtype,
    has_amx,
    is_fused,
    is_low,
    narrow_rows,
    parts,
    slab_logits,
)
from longattn.ops.tiles import Run, additive_mask
from longattn.ops.views import key_view, query_view, slabs

__all__ = ["forward"]

PACKED_ROWS = 192  # from this many query rows on, the fused call may copy keys and values into packed form


def forward(query: Tensor, key: Tensor, value: Tensor, job: Job, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over the job's bands.

    Args:
        query: (B, Hq, Sq, D); key, value: (B, Hkv, Sk, D); the last dim contiguous.
        sink_logits: (Hq,), joins the denominator and the log-sum-exp.

    Returns:
        out like query, and the log-sum-exp (B, Hq, Sq) in the accumulation dtype.
    """
    out = empty_like_order(query)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=accumulate_dtype(query.dtype), device=query.device)
    work = parts(job, query, key, _block_rows(query, job))
    if not _covers(work, query):
        out.zero_()
    for part in work:
        for run in part.runs:
            for piece in _pieces(run, part, query):
                _run_forward(part, piece, query, key, value, out, lse, job)
    if sink_logits is not None:
        _join_sink_logits(out, lse, sink_logits)
    return out, lse


def _block_rows(query: Tensor, job: Job) -> int:
    """Rows of a sliding tile: 32, as the fused call splits queries; with AMX and wide windows 256, which it packs."""
    widths = [band.left + band.right for _, band in job.bands if isinstance(band, WindowBand)]
    wide = is_low(query.dtype) and max(widths, default=0) > 256
    return 256 if wide and is_fused(query, job) and has_amx() else 32


def _covers(work: list[Part], query: Tensor) -> bool:
    """Whether every output row is written by a run that is not a prefix."""
    rows = 0
    for part in work:
        batch = part.segment.batch[1] - part.segment.batch[0]
        rows += batch * part.heads.count * sum(run.rows * run.count for run in part.runs if not run.prefix)
    return rows == query.shape[0] * query.shape[1] * query.shape[2]


def _pieces(run: Run, part: Part, query: Tensor) -> list[Run]:
    """A run in as few pieces as keep temporaries well below the output's size."""
    heads = part.heads.count * (part.segment.batch[1] - part.segment.batch[0])
    budget = max(query.shape[0] * query.shape[1] * query.shape[2] // 2, 1 << 16)  # rows of D elements
    packed = 2 * run.cols if run.rows >= PACKED_ROWS and is_low(query.dtype) else 0
    most = max(1, budget // (heads * (run.rows + packed)))
    if run.count > 1:
        return [run.tiles(t, min(most, run.count - t)) for t in range(0, run.count, most)]
    if run.prefix:
        return list(run.narrowed(max(32, budget // heads)))
    return [run]


def _run_forward(
    part: Part, run: Run, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, job: Job
) -> None:
    segment, heads = part.segment, part.heads
    q, o, m = (query_view(x, segment.batch, heads, segment.query[0], run) for x in (query, out, lse))
    k, v = (key_view(x, segment.batch, heads, segment.key[0], run) for x in (key, value))
    if is_fused(query, job):
        sizes = q.shape[:3]
        shortest = min(range(3), key=lambda axis: sizes[axis])
        mask = additive_mask(run, query.dtype, query.device)
        for i in range(sizes[shortest]):
            part_out, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(x.select(shortest, i) for x in (q, k, v)),
                0.0,
                run.kind == "triangle",
                attn_mask=mask,
                scale=job.scale,
            )
            _store(o.select(shortest, i), m.select(shortest, i), part_out, part_lse, run.prefix)
        return
    for narrow in run.narrowed(narrow_rows(run)):
        q, o, m = (query_view(x, segment.batch, heads, segment.query[0], narrow) for x in (query, out, lse))
        k, v = (key_view(x, segment.batch, heads, segment.key[0], narrow) for x in (key, value))
        for index in slabs(q.shape[:3], max(1, SLAB // (narrow.rows * narrow.cols))):
            logits, _ = slab_logits(part, narrow, index, q[index].to(lse.dtype), k[index].to(lse.dtype), job)
            largest = logits.amax(-1, keepdim=True)  # (slab, rows, 1)
            largest.masked_fill_(largest == -torch.inf, 0.0)
            weights = logits.sub_(largest).exp_()
            total = weights.sum(-1, keepdim=True)  # 0 where a row sees nothing
            part_out = torch.bmm(weights, v[index].to(lse.dtype)).div_(total.masked_fill(total == 0.0, 1.0))
            _store(o[index], m[index], part_out, (largest + total.log()).squeeze(-1), run.prefix)


def _store(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, merge: bool) -> None:
    """Write a tile's result, or merge it into what is there by the log-sum-exps."""
    if not merge:
        out.copy_(part_out)
        lse.copy_(part_lse)
        return
    total = torch.logaddexp(lse, part_lse)
    finite = total.masked_fill(total == -torch.inf, 0.0)
    old, new = ((x - finite).exp_()[..., None] for x in (lse, part_lse))
    out.copy_(out * old + part_out * new)
    lse.copy_(total)


def _join_sink_logits(out: Tensor, lse: Tensor, sink_logits: Tensor) -> None:
    """One more logit a head in the denominator: out shrinks by exp(lse - total), in place, a head at a time."""
    total = torch.logaddexp(lse, sink_logits.to(lse.dtype)[None, :, None])
    shrink = lse.sub_(total.masked_fill(total == -torch.inf, 0.0)).exp_()
    for head in range(out.shape[1]):
        out[:, head] = out[:, head] * shrink[:, head, :, None]
    lse.copy_(total)
