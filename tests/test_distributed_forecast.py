"""What is predicted of a text over ranks: bytes against what gloo ranks send, times against the closed formulas."""

from __future__ import annotations

import dataclasses
import doctest

import distributed_models as models
import pytest
from distributed_ranks import Ranks
from hf_models import build

from longattn import units
from longattn.cli import inspect_ranks
from longattn.costs import AttentionLayer, Decoder, activation_bytes
from longattn.distributed import forecast as forecasts
from longattn.distributed import messages
from longattn.distributed.forecast import forecast, layer_bytes
from longattn.pattern import Pattern
from longattn.plan import Plan
from longattn.structure import decoder_of
from longattn.surgery import extend

ALL_KINDS = "window:9+sinks:2, group:6+shift, full, window:30"
RATES = dict(parameters=1000, link=45e9, flops=4e14)


@pytest.fixture(scope="module")
def eight():
    ranks = Ranks(8)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize(
    ("ranks", "attention", "length", "full"),
    [
        (2, ALL_KINDS, 48, "gather"),
        (2, ALL_KINDS, 47, "ulysses"),
        (3, ALL_KINDS, 50, "gather"),
        (8, ALL_KINDS, 64, "gather"),
        (8, "window:200, group:50+shift:7, group:8+shift+sinks:20, window:1", 61, "gather"),
    ],
)
def test_bytes_are_those_that_ranks_send(eight, ranks, attention, length, full):
    model = build("llama")
    extend(model, None, Plan(attention=attention))
    decoder = dataclasses.replace(decoder_of(model.config), dtype_bytes=8)  # the ranks run in float64
    found = forecast(decoder, length, ranks, full=full, **RATES)
    sent = eight.run(ranks, models.traffic_of, attention, length, full)
    for step in ("forward", "training", "checkpointed"):
        assert [rank[step] for rank in sent] == list(getattr(found, step).sent_bytes), step
    assert found.training.sent_bytes != found.checkpointed.sent_bytes


LLAMA_8B = AttentionLayer(Pattern("window", 4096), heads=32, kv_heads=8, head_dim=128)


@pytest.mark.parametrize(("tokens", "ranks"), [(2**20, 8), (10 * 2**20, 512), (100 * 2**20, 1024)])
def test_halo_of_a_window_is_the_same_whatever_the_length_and_the_ranks(tokens, ranks):
    sent, received = layer_bytes(LLAMA_8B, tokens // ranks, ranks, 2)
    halo = 4095 * 2 * 8 * 128 * 2
    assert sent == [halo] * (ranks - 1) + [0] and received == [0] + [halo] * (ranks - 1)


def test_times_are_the_cost_model_s():
    decoder = Decoder((LLAMA_8B,) * 32, 4096, 14336, 128256, dtype_bytes=2)
    found = forecast(decoder, 2**20, 64, **RATES)
    tokens = 2**14
    halo_s = 4095 * 4096 / 45e9
    attention = 4 * 32 * 128 * 4096 * tokens / 4e14  # each query of the last rank sees the whole window
    linear = 2 * 4096 * (32 * (2 * 40 * 128 + 3 * 14336) + 128256) * tokens / 4e14
    assert found.forward.communication_s == pytest.approx(32 * halo_s)
    assert found.forward.compute_s == pytest.approx(32 * attention + linear)
    assert found.forward.exposed_s == 0 and found.forward.share == pytest.approx(
        32 * halo_s / (32 * halo_s + 32 * attention + linear)
    )
    assert found.training.compute_s == pytest.approx(32 * attention * 3.5 + linear * 3)
    assert found.checkpointed.compute_s == pytest.approx(32 * attention * 4.5 + linear * 4)
    assert found.checkpointed.communication_s == pytest.approx(3 * 32 * halo_s)
    assert found.activation_bytes == activation_bytes(decoder, tokens)
    assert found.remote_bytes == 32 * found.remote_layer_bytes == 32 * 4095 * 4096
    assert found.parameter_bytes == 16 * 1000 // 64


def test_full_layers_say_what_they_cost():
    layer = AttentionLayer(Pattern("full"), heads=32, kv_heads=8, head_dim=128)
    decoder = Decoder((layer,), 4096, 14336, 128256, dtype_bytes=2)
    gather, ulysses = (forecast(decoder, 2**20, 8, full=full, **RATES) for full in ("gather", "ulysses"))
    shard = 2**17 * 4096
    assert gather.remote_bytes == 7 * shard and max(gather.forward.sent_bytes) == 7 * shard
    assert set(ulysses.forward.sent_bytes) == {2 * 40 * 128 * 2**17 * 2 * 7 // 8}
    pairs = layer.pattern.visible
    last, mean = pairs(2**20) - pairs(7 * 2**17), pairs(2**20) / 8
    apart = 4 * 32 * 128 * (last - mean) / 4e14
    assert gather.forward.compute_s - ulysses.forward.compute_s == pytest.approx(apart)
    assert ulysses.forward.exposed_s == ulysses.forward.communication_s
    with pytest.raises(ValueError, match="needs heads that 16 ranks can share, got 32 and 8 kv"):
        forecast(decoder, 2**20, 16, full="ulysses", **RATES)


@pytest.mark.parametrize("name", ["num_tokens", "ranks", "link", "flops"])
def test_numbers_that_are_not_positive_are_refused(name):
    decoder = Decoder((LLAMA_8B,), 4096, 14336, 128256, dtype_bytes=2)
    given = {"num_tokens": 16, "ranks": 2, **RATES, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        forecast(decoder, given.pop("num_tokens"), given.pop("ranks"), **given)


@pytest.mark.parametrize("module", [forecasts, messages, inspect_ranks, units])
def test_examples_in_docstrings_hold(module):
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0
