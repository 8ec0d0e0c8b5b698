"""Who is measured on a GPU beside longattn: FlashAttention-2 and 4, FlexAttention, cuDNN, causal SDPA."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from longattn.bench.cases import Case
from longattn.bench.gpu.cells import same_area
from longattn.bench.gpu.cudnn import attention
from longattn.bench.peers import OURS, PEERS, Attend, Peer
from longattn.pattern import Pattern

__all__ = ["FLASH", "FLEX", "WINDOW", "gpu_peers"]

FLASH, FLEX, WINDOW = "FlashAttention-2", "flex attention", "longattn, window of the same area"


def _bounds(pattern: Pattern) -> tuple[int, int]:
    """FlashAttention's window: keys besides the query's own."""
    return (-1, 0) if pattern.kind == "full" else (pattern.size - 1, 0)


def _token_major(x: Tensor) -> Tensor:
    """(B, H, S, D) to (B, S, H, D), which is its memory."""
    return x.transpose(1, 2)


def _flash(case: Case) -> Attend:
    left, right = _bounds(case.pattern)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        inputs = (_token_major(x) for x in (query, key, value))
        out = torch.ops.aten._flash_attention_forward(
            *inputs, None, None, case.num_queries, case.tokens, 0.0, left < 0, False,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return _token_major(out[0])

    return call


def _varlen(case: Case) -> Attend:
    varlen_attn: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    gqa = case.kv_heads != case.heads and "enable_gqa" in inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": _bounds(case.pattern), **({"enable_gqa": True} if gqa else {})}
    lengths = case.num_queries, case.tokens
    borders = [
        torch.arange(case.batch + 1, device=case.device, dtype=torch.int32) * length for length in lengths
    ]  # fmt: skip

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        packed = (_token_major(x).flatten(0, 1) for x in (query, key, value))  # (B S, H, D)
        out = varlen_attn(*packed, *borders, *lengths, **options)
        return _token_major(out.unflatten(0, (case.batch, case.num_queries)))

    return call


def _flash4(case: Case) -> Attend:
    flash_attn_func: Any = importlib.import_module("flash_attn.cute").flash_attn_func
    window = (None, 0) if case.pattern.kind == "full" else _bounds(case.pattern)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = flash_attn_func(*(_token_major(x) for x in (query, key, value)), causal=True, window_size=window)
        return _token_major(out[0] if isinstance(out, tuple) else out)

    return call


def _flex(case: Case) -> Attend:
    """As on the CPU; its backward is asked for more than once of one output here."""
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False
    return _known(FLEX).prepare(case)


def _known(name: str) -> Peer:
    return next(peer for peer in PEERS if peer.name == name)


def _same_window(case: Case) -> Attend:
    return same_area(case.pattern, case.tokens).attend


SPANS = ("full", "window")
ALL = (
    _known(OURS),
    Peer(FLASH, _flash, kinds=SPANS, note="aten._flash_attention_forward"),
    Peer("FlashAttention-2, varlen_attn", _varlen, kinds=SPANS, note="packed documents"),
    Peer(FLEX, _flex, compiled=True, note=_known(FLEX).note),
    Peer("cuDNN", attention, kinds=SPANS, note="nvidia-cudnn-frontend"),
    Peer("FlashAttention-4", _flash4, kinds=SPANS, note="flash-attn-4"),
    _known("sdpa, causal"),
)


def gpu_peers(what: str, case: Case) -> list[Peer]:
    """The peers of a cell of `core`, longattn first."""
    peers = [peer for peer in ALL if case.pattern.kind in peer.kinds]
    if what == "group":
        window = Peer(WINDOW, _same_window, lambda pattern: same_area(pattern, case.tokens), note="other work")
        peers.insert(1, window)
    return peers
