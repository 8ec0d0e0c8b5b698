"""Who is measured: longattn and the attention people would otherwise use, each behind the same three-tensor call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longattn.bench.cases import Case
from longattn.bench.reference import first_seen
from longattn.pattern import Pattern

__all__ = ["OURS", "PEERS", "Attend", "Peer", "peers_for"]

OURS = "longattn"
FLEX_BLOCK = {"cpu": 64, "cuda": 128}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _same(pattern: Pattern) -> Pattern:
    return pattern


@dataclass(frozen=True)
class Peer:
    """One way to compute attention.

    Args:
        prepare: makes the call for a case; masks are built here, outside the timing. It raises what its library raises.
        sees: the pattern it computes where asked for a case's, which is the one its results are checked against.
        kinds: patterns it can be asked for.
        compiled: whether its first call compiles.
        note: what a reader of the table must know.
    """

    name: str
    prepare: Callable[[Case], Attend]
    sees: Callable[[Pattern], Pattern] = _same
    kinds: tuple[str, ...] = ("full", "window", "group")
    compiled: bool = False
    note: str = ""


def _longattn(case: Case) -> Attend:
    return case.pattern.attend


def dense_mask(case: Case) -> Tensor:
    """Bool (heads or 1, queries, S): which key each query sees."""
    keys = torch.arange(case.tokens, device=case.device)
    positions = keys[case.tokens - case.num_queries :]
    heads = range(case.heads) if case.pattern.shift else range(1)
    masks = []
    for head in heads:
        low = first_seen(case.pattern, positions, head, case.heads)[:, None]  # (queries, 1)
        band = (keys >= low) | (keys < case.pattern.sinks)
        masks.append(band & (keys <= positions[:, None]))
    return torch.stack(masks)


def _sdpa_mask(case: Case) -> Attend:
    mask, gqa = dense_mask(case)[None], case.kv_heads != case.heads
    return lambda query, key, value: scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=gqa)


def _sdpa_causal(case: Case) -> Attend:
    gqa, causal = case.kv_heads != case.heads, case.num_queries > 1
    if causal and case.num_queries != case.tokens:
        raise ValueError("its causal mask starts at the first key: one query, or as many as keys")
    return lambda query, key, value: scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=gqa)


def _flex_mask(case: Case) -> Callable[..., Tensor]:
    size, shift, half, sinks = case.pattern.size, case.pattern.shift, case.heads // 2, case.pattern.sinks
    start = case.tokens - case.num_queries

    def window(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return (col <= row + start) & ((row + start - col < size) | (col < sinks))

    def group(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        moved = torch.where(head >= half, shift, 0)
        same = (row + start + moved) // size == (col + moved) // size
        return (col <= row + start) & (same | (col < sinks))

    def causal(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return col <= row + start

    return {"window": window, "group": group, "full": causal}[case.pattern.kind]


def _flex(case: Case) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    heads = case.heads if case.pattern.shift else None
    sizes: dict[str, Any] = dict(device=case.device, BLOCK_SIZE=FLEX_BLOCK[case.device])
    blocks = create_block_mask(_flex_mask(case), None, heads, case.num_queries, case.tokens, **sizes)
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = case.kv_heads != case.heads
    return lambda query, key, value: compiled(query, key, value, block_mask=blocks, enable_gqa=gqa)


def _local_attention(case: Case) -> Attend:
    if case.kv_heads != case.heads:
        raise ValueError("as many key/value heads as query heads only")
    attend = importlib.import_module("local_attention").LocalAttention(
        case.pattern.size, causal=True, exact_windowsize=True, autopad=True, use_rotary_pos_emb=False, scale=None
    )

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        flat = (x.reshape(-1, case.tokens, case.head_dim) for x in (query, key, value))
        return attend(*flat).view(query.shape)

    return call


def _transformers(implementation: str) -> Callable[[Case], Attend]:
    """Mistral's sliding window as transformers computes it, mask (outside the timing) and attention function."""

    def prepare(case: Case) -> Attend:
        from transformers import MistralConfig
        from transformers.masking_utils import create_sliding_window_causal_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.mistral.modeling_mistral import MistralAttention, eager_attention_forward

        sizes: dict[str, Any] = dict(num_attention_heads=case.heads, num_key_value_heads=case.kv_heads)
        sizes.update(head_dim=case.head_dim, hidden_size=case.heads, sliding_window=case.pattern.size)
        config = MistralConfig(**sizes, **dict[str, Any](attn_implementation=implementation))
        module = MistralAttention(config, layer_idx=0)
        hidden = torch.zeros(case.batch, case.tokens, 1, dtype=case.dtype, device=case.device)
        positions = torch.arange(case.tokens, device=case.device)[None]
        mask = create_sliding_window_causal_mask(config, hidden, None, None, position_ids=positions)
        function: Any = (
            eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        )

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out, _ = function(module, query, key, value, mask, scaling=case.head_dim**-0.5, dropout=0.0)
            return out.transpose(1, 2)

        return call

    return prepare


PEERS = (
    Peer(OURS, _longattn),
    Peer("flex attention", _flex, compiled=True, note="compiled, block mask built outside the timing"),
    Peer("sdpa, dense mask", _sdpa_mask, note="mask built outside the timing"),
    Peer("sdpa, causal", _sdpa_causal, lambda pattern: Pattern("full"), note="other work: every earlier key"),
    Peer(
        "local-attention",
        _local_attention,
        lambda pattern: replace(pattern, size=pattern.size + 1),
        kinds=("window",),
        note="other work: one key more a query",
    ),
    Peer(
        "transformers, sdpa", _transformers("sdpa"), kinds=("window",), note="Mistral's mask, built outside the timing"
    ),
    Peer(
        "transformers, eager",
        _transformers("eager"),
        kinds=("window",),
        note="Mistral's mask, built outside the timing",
    ),
)


def peers_for(pattern: Pattern, names: list[str] | None = None) -> list[Peer]:
    """The peers that can be asked for a pattern, longattn first; only those named, if any are."""
    known = [peer.name for peer in PEERS]
    for name in names or []:
        if name not in known:
            raise ValueError(f"bench: peer must be one of {', '.join(repr(name) for name in known)}, got {name!r}")
    wanted = known if not names else [OURS, *names]
    return [peer for peer in PEERS if peer.name in wanted and pattern.kind in peer.kinds]
