"""A few small calls of every kernel, for tools that slow a program down a hundredfold, such as compute-sanitizer.

python tests/cuda_small_set.py [cuda]
"""

from __future__ import annotations

import sys

import torch

import longattn


def attention(device: str) -> int:
    """Forward and backward of both ops, over head dims and rows; the number of calls."""
    documents = torch.tensor([0, 40, 40, 97], dtype=torch.int32, device=device)
    start, end = (torch.tensor([at], dtype=torch.int32, device=device) for at in (13, 90))
    calls = 0
    for dim in (20, 64, 128, 256):
        for rows in ({}, {"cu_seqlens": documents}, {"kv_start": start, "kv_end": end}):
            query, key, value = (
                torch.randn(1, 97, heads, dim, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
                for heads in (4, 2, 2)
            )
            logits = torch.randn(4, device=device, requires_grad=True)
            shared = dict(sink_tokens=3, sink_logits=logits, **rows)
            out = longattn.window_attention(query, key, value, 30, **shared)
            out = out + longattn.group_attention(query, key, value, 32, shift=16, softcap=5.0, **shared)
            torch.autograd.grad(out.float().square().sum(), (query, key, value, logits))
            calls += 2
    return calls


def decoding(device: str) -> int:
    end = torch.tensor([500, 77], dtype=torch.int32, device=device)
    for queries, dim in ((1, 64), (1, 128), (5, 128)):
        query = torch.randn(2, 8, queries, dim, device=device, dtype=torch.bfloat16)
        key = torch.randn(2, 1, 500, dim, device=device, dtype=torch.bfloat16)
        longattn.window_attention(query, key, key, (-1, 0), sink_tokens=2, kv_end=end)
        longattn.window_attention(query, key, key, 100, kv_end=end)
    return 6


def rotary(device: str) -> int:
    for dtype in (torch.float32, torch.bfloat16):
        for dim, half, interleaved in ((64, 32, False), (80, 20, True), (20, 3, False)):
            query = torch.randn(2, 4, 37, dim, device=device, dtype=dtype, requires_grad=True)
            key = torch.randn(2, 2, 37, dim, device=device, dtype=dtype)
            cos, sin = torch.randn(2, 37, half, device=device)
            turned, _ = longattn.apply_rope(query, key, cos, sin, interleaved=interleaved)
            torch.autograd.grad(turned.float().square().sum(), query)
            inv_freq = torch.rand(half, device=device, dtype=torch.float64)
            positions = torch.arange(37, device=device) + 10_000_000
            longattn.apply_rope_positions(query, key, positions, inv_freq, interleaved=interleaved)
    return 12


def main(device: str) -> None:
    calls = attention(device) + decoding(device) + rotary(device)
    if device != "cpu":
        torch.cuda.synchronize()
    print(f"{calls} calls on {device}")


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "cpu")
