"""Calls of the attention ops drawn at random, every feature independently of the others, where they may meet."""

from __future__ import annotations

from functools import partial

import torch
from hypothesis import strategies as st
from reference import check_against_dense, half_shifts, visible_mask

import longattn

__all__ = ["GROUPS", "LENGTHS", "WINDOWS", "calls", "check_group", "check_window"]

LENGTHS = (1, 2, 7, 31, 32, 33, 64, 100, 230)
LOW_LENGTHS = (33, 64, 100, 230)  # of 16-bit calls: fewer elements than these make norms of errors a matter of luck
WINDOWS = st.sampled_from([(-1, 0), (0, 0), (3, 0), (16, 0), (70, 0), (40, 5), (-1, -1), (5, -1), (0, 9)])
GROUPS = st.sampled_from([1, 2, 5, 16, 32, 50, 128])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@st.composite
def calls(draw, dtypes=DTYPES, lengths=LENGTHS, low_lengths=LOW_LENGTHS, dims=(8, 16, 40, 64), short_queries=False):
    """One call: query, key, value, sink logits or None, the options that both ops share, and the rows' ends.

    Args:
        low_lengths: lengths of keys of 16-bit calls.
        short_queries: whether 16-bit calls too may have fewer queries than keys.
    """
    dtype = draw(st.sampled_from(dtypes))
    sk = draw(st.sampled_from(lengths if dtype.itemsize >= 4 else low_lengths))
    rows = draw(st.sampled_from(["none", "none", "kv_start", "kv_end", "both", "documents"]))
    batch = 1 if rows == "documents" else draw(st.integers(1, 3))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    square = rows == "documents" or (dtype.itemsize < 4 and not short_queries)
    sq = sk if square else draw(st.sampled_from(sorted({1, sk, max(1, sk // 2)})))
    dim = draw(st.sampled_from(dims))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    token_major = draw(st.booleans())

    def tensor(heads, length):
        if token_major:
            return torch.randn(batch, length, heads, dim, generator=generator).to(dtype).transpose(1, 2)
        return torch.randn(batch, heads, length, dim, generator=generator).to(dtype)

    ends = {}
    for name in ("kv_start", "kv_end"):
        if rows in (name, "both"):
            drawn = draw(st.lists(st.integers(0, sk), min_size=batch, max_size=batch))
            ends[name] = torch.tensor(drawn, dtype=torch.int32)
    if rows == "documents":
        inner = sorted(draw(st.lists(st.integers(0, sk), max_size=5)))
        ends["cu_seqlens"] = torch.tensor([0, *inner, sk], dtype=torch.int32)
    logits = torch.randn(group * kv_heads, generator=generator) if draw(st.booleans()) else None
    shared = dict(sink_tokens=draw(st.sampled_from([0, 0, 1, 4, 20])), softcap=draw(st.sampled_from([0.0, 0.0, 2.0])))
    heads = group * kv_heads
    return tensor(heads, sq), tensor(kv_heads, sk), tensor(kv_heads, sk), logits, shared, ends


def _attend(op, band, options, device, query, key, value, sink_logits):
    """The op on tensors of `device`, given and returned on the CPU."""
    query, key, value = (x.to(device) for x in (query, key, value))
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    sink_logits = None if sink_logits is None else sink_logits.to(device)
    out, lse = op(query, key, value, *band, sink_logits=sink_logits, return_lse=True, **options)
    return out.cpu(), lse.cpu()


def check_window(call, window, *, use_lse=False, device="cpu"):
    """Window attention, forward and backward, against the float64 reference."""
    q, k, v, logits, shared, rows = call
    mask = visible_mask(*q.shape[:3], k.shape[2], window=window, sinks=shared["sink_tokens"], **rows)
    attend = partial(_attend, longattn.window_attention, (window,), {**shared, **rows}, device)
    check_against_dense(attend, q, k, v, mask, softcap=shared["softcap"], sink_logits=logits, use_lse=use_lse)


def check_group(call, group, shift, causal=True, *, use_lse=False, device="cpu"):
    """Group attention likewise."""
    q, k, v, logits, shared, rows = call
    shifts = half_shifts(q.shape[1], shift)
    sinks = shared["sink_tokens"]
    mask = visible_mask(*q.shape[:3], k.shape[2], group=group, shifts=shifts, causal=causal, sinks=sinks, **rows)
    options = dict(shift=shift, causal=causal, **shared, **rows)
    attend = partial(_attend, longattn.group_attention, (group,), options, device)
    check_against_dense(attend, q, k, v, mask, softcap=shared["softcap"], sink_logits=logits, use_lse=use_lse)
