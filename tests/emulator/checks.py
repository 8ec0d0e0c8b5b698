"""Holds an emulated attention kernel, forward and backward, to the float64 reference."""

from __future__ import annotations

import torch
from emulator.attention import Call, Emulated
from reference import check_against_dense, visible_mask
from torch import Tensor

ONE_HEAD_DIM = ("-O0", "-g", "-DLONGATTN_ONLY_HEAD_DIM=32")  # builds that take long


def mask_of(query, key, call, **rows):
    band = {"window": call.window} if call.window else {"group": call.group, "shifts": call.shifts}
    return visible_mask(
        query.shape[0], query.shape[1], query.shape[2], key.shape[2], **band, causal=call.causal, sinks=call.sinks,
        query_start=call.query_start, key_start=call.key_start, **rows,
    )  # fmt: skip


def _no_conflicts(emulated):
    conflicts = emulated.counters["bank_conflicts"]
    assert conflicts == 0, f"{conflicts} cycles lost to bank_conflicts"


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sink_logits, emulated, call, seed, rows):
        out, lse = emulated.forward(query, key, value, call, sink_logits=sink_logits, seed=seed, **rows)
        _no_conflicts(emulated)
        ctx.save_for_backward(query, key, value, sink_logits, out, lse)
        ctx.rest = emulated, call, seed, rows
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        query, key, value, sink_logits, out, lse = ctx.saved_tensors
        emulated, call, seed, rows = ctx.rest
        grads = emulated.backward(
            grad_out.contiguous(), grad_lse.contiguous(), (query, key, value), (out, lse), call,
            sink_logits=sink_logits, seed=seed, **rows,
        )  # fmt: skip
        _no_conflicts(emulated)
        return *grads, *(None,) * (8 - len(grads))


def check(
    emulated: Emulated,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    sink_logits: Tensor | None = None,
    *,
    seed: int = 0,
    use_lse: bool = True,
    **rows: Tensor,
) -> None:
    """Out, lse and all gradients against the float64 reference, by the project's tolerance."""

    def attend(query, key, value, sink_logits):
        return Attention.apply(query, key, value, sink_logits, emulated, call, seed, rows)

    mask = mask_of(query, key, call, **rows)
    options = dict(scale=call.scale, softcap=call.softcap, sink_logits=sink_logits, use_lse=use_lse, seed=seed)
    check_against_dense(attend, query, key, value, mask, **options)


def qkv(batch, heads, kv_heads, sq, sk, head_dim, dtype=torch.bfloat16, token_major=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, sq), (kv_heads, sk), (kv_heads, sk))
    if token_major:
        made = (torch.randn(batch, s, h, head_dim, generator=generator).transpose(1, 2) for h, s in shapes)
    else:
        made = (torch.randn(batch, h, s, head_dim, generator=generator) for h, s in shapes)
    return tuple(x.to(dtype) for x in made)


def check_nan(emulated, queries, keys):
    """A query of NaN comes out as NaN, with its log-sum-exp; the others do not."""
    query, key, value = qkv(2, 4, 2, queries, keys, 64)
    query[1, 2, -1, 5] = torch.nan
    for call, sink_logits in ((Call(window=(20, 0), sinks=3), None), (Call(window=(-1, -1)), torch.zeros(4))):
        out, lse = emulated.forward(query, key, value, call, sink_logits=sink_logits)
        assert out[1, 2, -1].isnan().all() and lse[1, 2, -1].isnan()
        assert out.isnan().sum() == 64 and lse.isnan().sum() == 1 and not lse.isinf().any()
