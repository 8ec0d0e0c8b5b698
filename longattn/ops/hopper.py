"""Which CUDA kernels serve a call: those for compute capability 9.0 where LONGATTN_HOPPER=1, or why not.

csrc/window_attn_fwd_sm90.cu and csrc/window_attn_bwd_sm90.cu decide by the same rules when they are called; here they
are put into words.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

__all__ = ["kernel_note", "why_not_hopper"]


def why_not_hopper(*tensors: Tensor) -> str | None:
    """What 16-bit query, key and value (B, H, S, D) lack for the kernels for compute capability 9.0, or None."""
    query, key = tensors[:2]
    if not 32 < query.shape[-1] <= 256:
        return "a head dim of 33 to 256"
    if query.shape[2] <= 64:
        return "more than 64 queries"
    if key.shape[2] == 0:
        return "at least one key"
    if query.shape[-1] % 8:  # then no output in one piece has such strides
        return "strides that are positive multiples of 16 bytes"
    for x in tensors:
        if x.data_ptr() % 16:
            return "tensors that start at multiples of 16 bytes"
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
            if size > 1 and (stride <= 0 or stride % 8):
                return "strides that are positive multiples of 16 bytes"
    return None


def kernel_note(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> str | None:
    """What `longattn.which` adds about a compiled call; None where LONGATTN_HOPPER asks for nothing."""
    if query.device.type != "cuda" or os.environ.get("LONGATTN_HOPPER") != "1":
        return None
    capability = torch.cuda.get_device_capability(query.device)
    if capability != (9, 0):
        return f"LONGATTN_HOPPER has no kernels for compute capability {capability[0]}.{capability[1]}"
    reason = why_not_hopper(query, key, value)
    if reason is not None:
        return f"the kernels for compute capability 9.0 need {reason}, so those for 8.0 run"
    return "forward and backward by the kernels for compute capability 9.0"
