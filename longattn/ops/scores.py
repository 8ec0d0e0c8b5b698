"""What forward and backward share of the explicit path: the job, block sizes, and the logits of a slab of tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.ops.band import Band, WindowBand
from longattn.ops.rows import RowEnds, Rows, Segment, segments
from longattn.ops.tiles import Run, additive_mask, make_runs
from longattn.ops.views import Heads, head_sets

__all__ = [
    "SLAB",
    "Job",
    "Part",
    "accumulate_dtype",
    "has_amx",
    "is_fused",
    "is_low",
    "narrow_rows",
    "parts",
    "slab_logits",
]

SLAB = 1 << 18  # logits of a batched product: what a core's cache holds of them


@dataclass(frozen=True)
class Job:
    """All that decides which logits there are: the band of each shift, the rows, and how logits are formed."""

    bands: tuple[tuple[int, Band], ...]  # shift -> band
    shifts: tuple[int, ...]  # one a query head
    rows: Rows
    sinks: int
    scale: float
    softcap: float


@dataclass(frozen=True)
class Part:
    """The runs of one segment and one set of heads; `ends` where rows must be masked on the device."""

    segment: Segment
    heads: Heads
    runs: tuple[Run, ...]
    ends: RowEnds | None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_low(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def has_amx() -> bool:
    """Whether the CPU has matrix tiles, which want taller blocks; False where this torch can't tell."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe is not None and probe())


def reads_values(device: torch.device) -> bool:
    """Whether the host may read index tensors that lie there."""
    return device.type == "cpu"


def is_fused(query: Tensor, job: Job) -> bool:
    """Whether PyTorch's own fused CPU attention serves the tiles; it has no soft cap, and scales its mask of -inf."""
    return query.device.type == "cpu" and not job.softcap and job.scale > 0


def narrow_rows(run: Run) -> int:
    """Rows of a tile whose logits fit into a slab, 16 at least: fewer would leave the products too thin."""
    return max(16, min(128, SLAB // run.cols))


def parts(job: Job, query: Tensor, key: Tensor, block: int) -> list[Part]:
    """Cut the job for query (B, Hq, Sq, D) and key (B, Hkv, Sk, D), into tiles of `block` rows where a band slides."""
    batch, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    if query.numel() == 0 or key.numel() == 0:
        return []
    masked = job.rows.ragged and not reads_values(query.device)
    if masked:
        whole = Segment((0, batch), (0, num_queries), (0, num_keys), job.rows.query_start, job.rows.key_start)
        cut = [whole]
    else:
        cut = segments(job.rows, batch, num_queries, num_keys)
    bands, found = dict(job.bands), []
    for shift, heads in head_sets(num_heads, key.shape[1], job.shifts):
        band, sinks, ends = bands[shift], job.sinks, None
        if masked:
            ends = RowEnds.of(band, job.rows, sinks, batch, num_queries, num_keys, query.device)
            band, sinks = _envelope(band, job), 0
        for segment in cut:
            rows = segment.query[1] - segment.query[0]
            cols = segment.key[1] - segment.key[0]
            runs = make_runs(band, rows, cols, segment.query_start, segment.key_start, sinks, block)
            found.append(Part(segment, heads, runs, ends))
    return found


def _envelope(band: Band, job: Job) -> Band:
    """A window that holds the band wherever rows and documents begin, formed from shapes alone."""
    if job.sinks or job.rows.kv_end is not None:
        return WindowBand(-1, -1)
    return band.envelope()


def slab_logits(
    part: Part, run: Run, index: tuple[int | slice, ...], query: Tensor, key: Tensor, job: Job
) -> tuple[Tensor, Tensor | None]:
    """Logits of one slab, masked, and the derivative of the soft cap.

    Args:
        query, key: (slab, rows, D) and (slab, cols, D), in the accumulation dtype.

    Returns:
        (slab, rows, cols) twice; the second is None without a soft cap.
    """
    mask = additive_mask(run, query.dtype, query.device)
    logits = torch.bmm(query, key.transpose(1, 2)).mul_(job.scale)
    slope = None
    if job.softcap:
        tanh = logits.div_(job.softcap).tanh_()
        slope = 1 - tanh.square()
        logits = tanh.mul_(job.softcap)
    if mask is not None:
        logits = logits.add_(mask)
    if part.ends is not None:
        logits = logits.masked_fill_(~_seen(part, run, index), -torch.inf)
    return logits, slope


def _seen(part: Part, run: Run, index: tuple[int | slice, ...]) -> Tensor:
    """bool (slab or 1, rows, cols): what the rows' own ends leave of a slab."""
    assert part.ends is not None
    batch, _, tiles = index
    device = part.ends.low.device
    tile = torch.arange(run.count, device=device)[tiles].reshape(-1, 1)
    query = run.query + tile * run.step + torch.arange(run.rows, device=device)  # (tiles, rows)
    key = run.key + tile * run.key_step + torch.arange(run.cols, device=device)  # (tiles, cols)
    first = part.segment.batch[0]
    if isinstance(batch, slice):
        rows = slice(first + batch.start, min(first + batch.stop, part.segment.batch[1]))
    else:
        rows = slice(first + batch, first + batch + 1)
    return part.ends.seen(rows, query[:, :, None], key[:, None, :]).flatten(0, 1)
