"""The float64 dense attention and the tolerance that every attention test and benchmark is held to.

Written from the definitions alone (band, sinks, rows, documents); it shares no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import longattn

FLOOR = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def visible_mask(
    batch: int,
    num_heads: int,
    sq: int,
    sk: int,
    *,
    window: tuple[int, int] | None = None,
    group: int | None = None,
    shifts: Sequence[int] | None = None,
    causal: bool = True,
    sinks: int = 0,
    cu_seqlens: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    query_start: int | None = None,
    key_start: int = 0,
) -> Tensor:
    """Which key each query sees: bool (batch, num_heads, sq, sk)."""
    mask = torch.zeros(batch, num_heads, sq, sk, dtype=torch.bool)
    keys = key_start + torch.arange(sk)[None, :]  # (1, sk)
    for b in range(batch):
        end = int(kv_end[b]) if kv_end is not None else key_start + sk
        offset = query_start if query_start is not None else (end if kv_end is not None else sk) - sq
        position = offset + torch.arange(sq)[:, None]  # (sq, 1)
        start = torch.full((sq, 1), int(kv_start[b]) if kv_start is not None else 0)
        stop = torch.full((sq, 1), end)
        if cu_seqlens is not None:
            bounds = cu_seqlens.tolist()
            for first, last in zip(bounds, bounds[1:], strict=False):
                inside = (position >= first) & (position < last)
                start, stop = torch.where(inside, first, start), torch.where(inside, last, stop)
        real = (keys >= start) & (keys < stop) & (position >= start)
        p, j = position - start, keys - start
        for h in range(num_heads):
            if window is not None:
                low = j >= p - window[0] if window[0] >= 0 else torch.ones_like(real)
                high = j <= p + window[1] if window[1] >= 0 else torch.ones_like(real)
            else:
                shift = shifts[h] if shifts is not None else 0
                begin = (p + shift) // group * group - shift
                low = j >= begin
                high = j <= (p if causal else begin + group - 1)
            mask[b, h] = real & high & (low | (j < sinks))
    return mask


def half_shifts(num_heads: int, shift: int) -> list[int]:
    """The shift of each head when the second half of them is shifted."""
    return [shift if head >= num_heads // 2 else 0 for head in range(num_heads)]


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Dense attention in `dtype`: (out (B, Hq, Sq, D), lse (B, Hq, Sq)); rows without a key give 0, their sink logit.

    sink_logits is (Hq,), or (B, Hq, Sq) where the gradient of each row's is wanted.
    """
    q, k, v = (x.to(dtype) for x in (query, key, value))
    group = q.shape[1] // max(1, k.shape[1])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = q @ k.transpose(-1, -2) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -math.inf)
    if sink_logits is not None:
        column = sink_logits.to(dtype)
        column = (column[None, :, None] if column.dim() == 1 else column)[..., None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], dim=-1)
    empty = (logits == -math.inf).all(-1)
    safe = logits.masked_fill(empty[..., None], 0.0)
    probabilities = torch.softmax(safe, -1).masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(safe, -1).masked_fill(empty, -math.inf)
    return probabilities[..., : k.shape[2]] @ v, lse


def error(got: Tensor, ref: Tensor) -> float:
    return float((got.double() - ref.double()).norm())


def assert_close(
    name: str,
    got: Tensor,
    ref: Tensor,
    dense_error: float = 0.0,
    *,
    floor: float | None = None,
    grad_value: Tensor | None = None,
    logit_norm: float = 1.0,
    norm: float | None = None,
) -> None:
    """Hold `got` to the project's tolerance: max(2 x dense's error, f x norm(ref), and for gradients a rounding floor).

    Args:
        dense_error: the error of the same maths done densely in the input dtype.
        floor: f, where the inputs' dtype is not the result's.
        grad_value: the float64 gradient of the values: where the true gradient is zero, rounding remains in
            proportion to its root mean square, over the keys that are seen (the others get exact zeros).
        logit_norm: max(1, scale x sqrt(D)).
        norm: of the terms that `ref` is the sum of, where those may cancel.
    """
    assert got.shape == ref.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(ref.shape)}"
    assert not torch.isnan(got).any(), f"{name}: NaN"
    infinite = torch.isinf(ref)
    assert torch.equal(torch.isinf(got), infinite), f"{name}: infinities differ"
    got, ref = got.masked_fill(infinite, 0.0), ref.masked_fill(infinite, 0.0)
    floor = FLOOR[got.dtype] if floor is None else floor
    bound = max(2 * dense_error, floor * (float(ref.double().norm()) if norm is None else norm))
    if grad_value is not None:
        seen = grad_value[grad_value.abs().sum(-1) > 0]
        rms = float(seen.square().mean().sqrt()) if seen.numel() else 0.0
        bound = max(bound, floor * logit_norm * rms * math.sqrt(got.numel()))
    found = error(got, ref)
    assert found <= bound, f"{name}: error {found:.3e} exceeds {bound:.3e} ({got.dtype}, norm {float(ref.norm()):.3e})"


def finite(x: Tensor) -> Tensor:
    return x.masked_fill(torch.isinf(x), 0.0)


def check_against_dense(
    attend: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    use_lse: bool = False,
    seed: int = 0,
) -> None:
    """Compare attend(query, key, value, sink_logits) -> (out, lse), and all its gradients, with the dense reference.

    `attend` runs on the path that dispatch picks, and on the pure one too where that is another.
    """
    dtype = query.dtype
    leaves = [x.detach().requires_grad_() for x in (query, key, value, *([] if sink_logits is None else [sink_logits]))]
    generator = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(query.shape, generator=generator).to(dtype)
    visible = mask.any(-1) if sink_logits is None else torch.ones(query.shape[:3], dtype=torch.bool)
    grad_lse = torch.randn(query.shape[:3], generator=generator).masked_fill(~visible, 0.0) * float(use_lse)

    def grads(out: Tensor, lse: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        loss = (out.double() * grad_out.double()).sum()
        loss = loss + (finite(lse).double() * grad_lse.double()).sum() if use_lse else loss
        return torch.autograd.grad(loss, inputs)

    def run() -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        out, lse = attend(*leaves, *([None] if sink_logits is None else []))
        return out.detach(), lse.detach(), grads(out, lse, leaves)

    found = [run()]
    if longattn.build_info()["compiled"] and dtype != torch.float64:
        with longattn.force("pure"):
            found.append(run())

    def run_dense(in_dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        inputs = [x.detach().to(in_dtype).requires_grad_() for x in leaves[:3]]
        sinks = None
        if sink_logits is not None:
            rows = sink_logits.detach().to(in_dtype)[None, :, None].expand(query.shape[:3]).contiguous()
            inputs.append(rows.requires_grad_())
            sinks = inputs[3]
        o, m = dense(*inputs[:3], mask, scale=scale, softcap=softcap, sink_logits=sinks, dtype=in_dtype)
        return o.detach(), m.detach(), grads(o, m, inputs)

    ref_out, ref_lse, ref = run_dense(torch.float64)
    low_out, low_lse, low = run_dense(dtype)
    for result in found:
        _assert_results(result, (ref_out, ref_lse, ref), (low_out, low_lse, low), scale, sink_logits, grad_out)


Results = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # out, lse, gradients


def _assert_results(
    result: Results,
    reference: Results,
    in_dtype: Results,
    scale: float | None,
    sink_logits: Tensor | None,
    grad_out: Tensor,
) -> None:
    """One path's results against the float64 reference, with what the same maths in the input dtype allows."""
    (out, lse, got), (ref_out, ref_lse, ref), (low_out, low_lse, low) = result, reference, in_dtype
    floor = FLOOR[out.dtype]
    assert_close("out", out, ref_out, error(low_out, ref_out))
    low_error = error(finite(low_lse), finite(ref_lse))
    rows = math.sqrt(lse.numel())
    assert_close("lse", lse, ref_lse, low_error, floor=floor, norm=max(rows, float(finite(ref_lse).norm())))
    head_dim = out.shape[-1]
    shared = dict(grad_value=ref[2], logit_norm=max(1.0, (scale or head_dim**-0.5) * math.sqrt(head_dim)))
    for name, a, b, c in zip(("grad_query", "grad_key", "grad_value"), got, ref, low, strict=False):
        assert a.dtype == out.dtype, f"{name}: {a.dtype}"
        assert_close(name, a, b, error(c, b), floor=floor, **shared)
    if sink_logits is not None:
        weight = (sink_logits.double()[None, :, None] - finite(ref_lse)).exp()
        terms = weight[..., None] * grad_out.double() * ref_out
        total = ref[3].sum((0, 2))
        assert got[3].dtype == sink_logits.dtype
        sink_floor = max(floor, FLOOR[sink_logits.dtype])
        low_error = error(low[3].double().sum((0, 2)), total)
        assert_close(
            "grad_sink_logits",
            got[3],
            total,
            low_error,
            floor=sink_floor,
            norm=float(terms.detach().norm() + ref[3].norm()),
            **shared,
        )
