"""How the public attention ops call the compiled private ones: schemas, what these serve, and where results go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.ops import dispatch
from longattn.ops.layout import empty_like_order

__all__ = ["backward", "define_private", "forward", "why_not_card", "why_not_compiled"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256
MOST_CUDA_HEADS = 256
LARGEST_SIZE = 1 << 30
OPTIONS = (
    "float scale, float softcap, int sink_tokens, Tensor? sink_logits, Tensor? cu_seqlens, Tensor? kv_start, "
    "Tensor? kv_end, int query_start, int key_start"
)
SINK_LOGITS = -6  # where the options hold sink_logits


def define_private(name: str, band_schema: str) -> None:
    """Define `longattn::<name>_fwd` and `_bwd`, which the compiled module implements; into their last tensors.

    The channels of all (B, H, S, D) tensors are contiguous; lse and its gradient are contiguous float32 (B, Hq, Sq),
    sink_logits and their gradient float32 (Hq,), the latter empty where there are none.
    """
    inputs = "Tensor query, Tensor key, Tensor value"
    dispatch.library.define(f"{name}_fwd({inputs}, {band_schema}, {OPTIONS}, Tensor(a!) out, Tensor(b!) lse) -> ()")
    dispatch.library.define(
        f"{name}_bwd(Tensor grad_out, Tensor? grad_lse, {inputs}, Tensor out, Tensor lse, {band_schema}, {OPTIONS}, "
        "Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor(d!) grad_sink_logits) -> ()"
    )


def why_not_compiled(query: Tensor, key: Tensor, *args: Any) -> str | None:
    """Why the compiled kernels can't serve these tensors; None where they can."""
    if query.device.type == "cuda":
        return _why_not_cuda(query)
    head_dim = query.shape[-1]
    if query.dtype not in DTYPES:
        return f"compiled for float32, bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > LARGEST_HEAD_DIM:
        return f"compiled for head dims that are multiples of 8 up to {LARGEST_HEAD_DIM}, not {head_dim}"
    if max(*query.shape, *key.shape) >= LARGEST_SIZE:
        return f"compiled for sizes below {LARGEST_SIZE}, not {max(*query.shape, *key.shape)}"
    module = dispatch.compiled_module()
    if query.device.type == "cpu" and module is not None and module.cpu_isa() == "none":
        return "this processor, or LONGATTN_CPU_ISA, allows neither AVX2 nor AVX-512"
    return None


def _why_not_cuda(query: Tensor) -> str | None:
    """As `why_not_compiled`, of tensors on a GPU: the limits of csrc/window_attn.h."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"compiled for bfloat16 and float16 on CUDA, not {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] > LARGEST_HEAD_DIM or query.shape[1] > MOST_CUDA_HEADS:
        limits = f"head dims up to {LARGEST_HEAD_DIM} and {MOST_CUDA_HEADS} query heads"
        return f"compiled for {limits}, not {query.shape[-1]} and {query.shape[1]}"
    return why_not_card(query.device)


def why_not_card(device: torch.device) -> str | None:
    """Why the CUDA kernels can't run on a card; None where they can."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compiled for compute capability 8.0 and later, not {capability[0]}.{capability[1]}"
    return None


def forward(name: str, query: Tensor, key: Tensor, value: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Run `longattn::<name>_fwd`.

    Args:
        query, key, value: (B, H, S, D) with contiguous channels.
        args: the public op's arguments behind them.

    Returns:
        out like query, and the log-sum-exp (B, Hq, Sq) float32.
    """
    out = empty_like_order(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    getattr(torch.ops.longattn, f"{name}_fwd").default(query, key, value, *_plain(args), out, lse)
    return out, lse


def backward(
    name: str, inputs: tuple[Tensor, ...], grad_lse: Tensor | None, args: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `longattn::<name>_bwd`.

    Args:
        inputs: grad_out, query, key, value, out, lse, as `forward` takes and returns them.
        grad_lse: (B, Hq, Sq), or None for zeros.
        args: the public op's arguments behind value.

    Returns:
        The gradients of query, key, value and sink_logits (empty where there are none).
    """
    grad_out, query, key, value, out, lse = inputs
    sink_logits = args[SINK_LOGITS]
    grads = empty_like_order(query), empty_like_order(key), empty_like_order(value)
    grad_sinks = query.new_empty(0 if sink_logits is None else len(sink_logits), dtype=torch.float32)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    run = getattr(torch.ops.longattn, f"{name}_bwd").default
    run(grad_out, grad_lse, query, key, value, out, lse.contiguous(), *_plain(args), *grads, grad_sinks)
    return *grads, query.new_empty(0) if sink_logits is None else grad_sinks.to(sink_logits.dtype)


def _plain(args: tuple[Any, ...]) -> list[Any]:
    """The arguments with sink_logits in float32 and every tensor contiguous."""
    plain = [arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args]
    sink_logits = plain[SINK_LOGITS]
    plain[SINK_LOGITS] = None if sink_logits is None else sink_logits.float()
    return plain
