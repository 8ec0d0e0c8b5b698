"""Sharded attention on gloo ranks: out, log-sum-exp and gradients are those of the whole sequence."""

from __future__ import annotations

import distributed_cases as cases
import pytest
import torch

N = 60
CASES = {
    "window": dict(tokens=N, window=8),
    "window longer than a shard": dict(tokens=N, window=40),
    "window longer than the sequence": dict(tokens=N, window=100),
    "one key": dict(tokens=N, window=1),
    "causal": dict(tokens=N, window=(-1, 0)),
    "both sides": dict(tokens=N, window=(5, 4)),
    "everything": dict(tokens=N, window=(-1, -1)),
    "uneven": dict(tokens=N + 1, window=19),
    "groups in shards": dict(tokens=N, group=5),
    "groups that straddle ranks": dict(tokens=N, group=16, shift=8),
    "groups longer than a shard": dict(tokens=N, group=35, shift=17),
    "groups, not causal": dict(tokens=N, group=16, shift=5, causal=False),
    "kv heads of both halves": dict(tokens=N, group=15, shift=7, heads=6, kv=3),
    "sinks": dict(tokens=N, window=5, sinks=7),
    "sinks longer than a shard": dict(tokens=N, window=9, sinks=33),
    "sinks of groups": dict(tokens=N, group=12, shift=5, sinks=4),
    "documents": dict(tokens=N, window=8, cu_seqlens=[0, 7, 31, 31, N]),
    "documents with sinks": dict(tokens=N, window=8, sinks=4, cu_seqlens=[0, 7, 11, 50, N]),
    "documents in groups": dict(
        tokens=N, group=12, shift=5, sinks=4, cu_seqlens=[0, 7, 11, 50, N], logits=True, softcap=2.0
    ),
    "sink logits": dict(tokens=N, window=8, logits=True, batch=2),
    "left padding": dict(tokens=N, window=8, batch=2, kv_start=[5, 33]),
    "left padding of groups": dict(tokens=N, group=8, shift=3, batch=2, kv_start=[5, 33]),
}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_sharded_attention_is_exact(gloo, ranks, name):
    found = gloo.run(ranks, cases.errors, CASES[name])[0]
    assert max(found.values()) <= 1e-14, found


@pytest.mark.parametrize("offsets", [[0, 0, N], [0, N, N], [0, 0, 3, 3, N], [0, 20, 20, 59, N]])
@pytest.mark.parametrize("name", ["window longer than a shard", "sinks", "groups that straddle ranks"])
def test_empty_and_uneven_shards_are_exact(gloo, offsets, name):
    found = gloo.run(len(offsets) - 1, cases.errors, {**CASES[name], "offsets": offsets})[0]
    assert max(found.values()) <= 1e-14, found


@pytest.mark.parametrize("name", ["window", "groups that straddle ranks", "sinks", "documents"])
def test_sharded_attention_compiles_in_one_graph(gloo, name):
    found = gloo.run(2, cases.compiled_errors, CASES[name])[0]
    assert max(found.values()) <= 1e-14, found


@pytest.mark.parametrize("name", ["window", "groups that straddle ranks"])
def test_sharded_ops_are_sound(gloo, name):
    for found in gloo.run(2, cases.op_check, CASES[name]):
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["sinks", "groups that straddle ranks"])
def test_shards_on_a_gpu_stay_there(gloo, name):
    for devices in gloo.run(2, cases.fake_devices, CASES[name]):
        assert set(devices) == {"cuda:0"}


def test_trades_of_full_layers_are_sound(gloo):
    for found in gloo.run(2, cases.trade_check):
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", ["dp x cp", "cp x tp"])
def test_meshes_of_two_dims_are_exact(gloo, kind):
    found = gloo.run(4, cases.mesh_errors, CASES["groups that straddle ranks"], kind)[0]
    assert max(found.values()) <= 1e-14, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["window longer than a shard", "groups that straddle ranks", "sinks"])
def test_low_precision_keeps_the_project_tolerance(gloo, name, dtype):
    found = gloo.run(3, cases.low_precision, CASES[name], dtype)[0]
    assert max(found) <= 1.0, found


def test_gradients_are_the_same_bits_run_after_run(gloo):
    assert all(gloo.run(4, cases.same_bits, CASES["sinks"]))


def test_no_grad_and_checkpointing_give_the_same(gloo):
    assert all(gloo.run(2, cases.no_gradients, CASES["window"]))


@pytest.mark.parametrize("tokens", [128, 512])
def test_bytes_of_a_window_do_not_grow_with_the_sequence(gloo, tokens):
    window, (kv, width, size) = 17, (2, 8, 4)
    for rank, (forward, backward) in enumerate(gloo.run(4, cases.sent_bytes, dict(tokens=tokens, window=window))):
        halo = 2 * kv * width * size * (window - 1)
        assert forward == [[halo if other == rank + 1 else 0 for other in range(4)]]
        assert backward == [[halo if other == rank - 1 else 0 for other in range(4)]]


def test_groups_send_their_shifted_half_alone(gloo):
    case = dict(tokens=128, group=16, shift=8)
    for rank, (forward, _) in enumerate(gloo.run(4, cases.sent_bytes, case)):
        quarter = 2 * 1 * 8 * 4 * 8  # one KV head of two, half a group
        assert forward == [[quarter if other == rank + 1 else 0 for other in range(4)]]


def test_documents_that_end_with_shards_send_nothing(gloo):
    case = dict(tokens=128, window=17, cu_seqlens=[0, 32, 64, 96, 128])
    assert gloo.run(4, cases.sent_bytes, case) == [[[], []]] * 4
