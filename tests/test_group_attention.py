"""Group attention against the float64 reference, and what shifting must and must not let through."""

from __future__ import annotations

import pytest
import torch
from reference import check_against_dense, half_shifts, visible_mask

import longattn


def tensors(batch=1, heads=4, kv_heads=2, sq=33, sk=33, dim=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, sq, dim), (batch, kv_heads, sk, dim), (batch, kv_heads, sk, dim))
    return [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in shapes]


def check(group, q, k, v, *, shift=0, causal=True, sink_tokens=0, softcap=0.0, sink_logits=None, **rows):
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    shifts = half_shifts(q.shape[1], shift)
    mask = visible_mask(*shape, group=group, shifts=shifts, causal=causal, sinks=sink_tokens, **rows)

    def attend(query, key, value, logits):
        options = dict(shift=shift, causal=causal, softcap=softcap, sink_tokens=sink_tokens, sink_logits=logits)
        return longattn.group_attention(query, key, value, group, return_lse=True, **options, **rows)

    check_against_dense(attend, q, k, v, mask, softcap=softcap, sink_logits=sink_logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group, shift", [(1, 0), (4, 2), (16, 0), (50, 25), (64, 13), (500, 250)])
@pytest.mark.parametrize("causal", [True, False])
def test_groups_match_reference(dtype, group, shift, causal):
    check(group, *tensors(sq=130, sk=130, dtype=dtype), shift=shift, causal=causal)


@pytest.mark.parametrize("sq, sk", [(1, 1), (1, 100), (20, 77), (64, 65)])
@pytest.mark.parametrize("shift", [0, 9])
def test_queries_are_the_last_tokens(sq, sk, shift):
    check(18, *tensors(sq=sq, sk=sk), shift=shift, sink_tokens=5)


@pytest.mark.parametrize("heads, kv_heads", [(6, 1), (6, 2), (6, 3), (5, 5), (1, 1)])
def test_shifted_half_crosses_shared_kv_heads(heads, kv_heads):
    check(12, *tensors(batch=2, heads=heads, kv_heads=kv_heads, sq=50, sk=50), shift=6, sink_tokens=2)


def test_padding_and_documents():
    q, k, v = tensors(batch=3, sq=40, sk=40)
    check(8, q, k, v, shift=4, kv_start=torch.tensor([0, 5, 33], dtype=torch.int32), sink_tokens=2)
    check(8, q[..., -2:, :], k, v, shift=3, kv_end=torch.tensor([40, 21, 2], dtype=torch.int32), softcap=2.0)
    logits = torch.linspace(-1, 1, 4)
    borders = torch.tensor([0, 11, 11, 40], dtype=torch.int32)
    check(8, q[:1], k[:1], v[:1], shift=4, cu_seqlens=borders, sink_tokens=1, sink_logits=logits)


@pytest.mark.parametrize("shift", [0, 1, 4, 7])
def test_no_query_sees_a_later_key(shift):
    q, k, v = tensors(sq=40, sk=40, dtype=torch.float32)
    before = longattn.group_attention(q, k, v, 8, shift=shift)
    k[:, :, 25:], v[:, :, 25:] = 100.0, -100.0
    after = longattn.group_attention(q, k, v, 8, shift=shift)
    assert torch.equal(before[:, :, :25], after[:, :, :25]) and not torch.equal(before[:, :, 25:], after[:, :, 25:])


def test_only_the_second_half_of_the_heads_is_shifted():
    q, k, v = tensors(sq=64, sk=64)
    plain, shifted = (longattn.group_attention(q, k, v, 16, shift=s) for s in (0, 8))
    assert torch.equal(plain[:, :2], shifted[:, :2])
    assert not torch.equal(plain[:, 2:, 8:], shifted[:, 2:, 8:])


def test_each_head_may_have_its_shift():
    q, k, v = tensors(sq=30, sk=30)
    whole = longattn.group_attention(q, k, v, 8, shift=4)
    args = (8, [4, 4], True, 0.25, 0.0, 0, None, None, None, None, 0, 0)
    out, _ = torch.ops.longattn.group_attention(q[:, 2:], k[:, 1:], v[:, 1:], *args)
    torch.testing.assert_close(out, whole[:, 2:])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(group_size=0), ValueError, "group_attention: group_size must be at least 1 token, got 0"),
        (dict(group_size=8, shift=8), ValueError, "shift must be >= 0 and below group_size 8, got 8"),
        (dict(group_size=8, shift=-1), ValueError, "shift must be >= 0 and below group_size 8, got -1"),
        (dict(group_size=8.0), TypeError, "group_attention: group_size must be an int, got 8.0"),
        (dict(group_size=8, causal=1), TypeError, "group_attention: causal must be a bool, got 1"),
    ],
)
def test_errors_name_op_argument_expected_and_got(arguments, error, message):
    q, k, v = tensors()
    with pytest.raises(error, match=message):
        longattn.group_attention(q, k, v, **arguments)
