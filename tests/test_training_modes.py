"""Training extended models under checkpointing, autocast and torch.compile: the same losses, gradients and patterns."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import TRAINED, masked, tokens, under_eager
from torch._dynamo.testing import CompileCounterWithBackend
from training_helpers import (
    SERVING,
    TRAINING,
    assert_gradients_agree,
    each_layer,
    extended,
    patterns_called,
    take_gradients,
)

from longattn.hf.attention import calls_seen
from longattn.pattern import parse_patterns
from longattn.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LENGTH = 20
POSITIONS = torch.tensor([[*range(5), *range(9), *range(6)], [0, *range(19)]])
BORDERS = torch.tensor([0, 5, 14, 20], dtype=torch.int32)
BY_BORDERS = dict(cu_seq_lens_q=BORDERS, cu_seq_lens_k=BORDERS, max_length_q=9, max_length_k=9)


def step(model, ids: torch.Tensor, **given) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(ids, labels=ids, use_cache=False, **given).loss
    loss.backward()
    return loss.detach(), take_gradients(model)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", TRAINED)
def test_checkpointed_steps_have_the_same_bits(family, reentrant):
    model, *_ = extended(family)
    model.train()
    ids = tokens(2, LENGTH)
    inputs = [(ids, {}), (ids, dict(position_ids=POSITIONS)), (ids[:1], {**BY_BORDERS, "position_ids": POSITIONS[:1]})]
    plain = [step(model, rows, **given) for rows, given in inputs]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for (rows, given), (loss, gradients) in zip(inputs, plain, strict=True):
        with calls_seen() as calls:
            got, recomputed = step(model, rows, **given)
        assert patterns_called(calls) == each_layer(model, TRAINING, 2)
        assert torch.equal(got, loss)
        assert recomputed.keys() == gradients.keys()
        assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("family", TRAINED)
def test_autocast_errs_no_more_than_dense_attention_does(family):
    exact, *_ = extended(family, torch.float64)
    exact.train()
    model = copy.deepcopy(exact).float()
    dense = under_eager(model, parse_patterns(TRAINING, model.config.num_hidden_layers))
    ids = tokens(2, LENGTH)
    weights = torch.randn(*ids.shape, exact.config.vocab_size, dtype=torch.float64)

    def run(forward, of) -> dict[str, torch.Tensor]:
        logits = forward(ids)
        (logits * weights.to(logits.dtype)).sum().backward()
        return {"logits": logits.detach(), **take_gradients(of)}

    expected = run(lambda rows: exact(rows).logits, exact)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(lambda rows: model(rows).logits, model)
        stock = run(lambda rows: masked(dense, rows), dense)
    assert got["logits"].dtype == torch.bfloat16
    for name, value in expected.items():
        assert name == "logits" or got[name].dtype == torch.float32
        error, allowed = (float((other[name] - value).norm() / value.norm()) for other in (got, stock))
        # a key's bias moves all logits of a row alike: what the gradient's terms leave of each other is mostly rounding
        factor = 3 if name.endswith("k_proj.bias") else 2
        assert error <= max(factor * allowed, 4e-3), f"{name}: {error:.1e}, dense {allowed:.1e}"


def assert_steps_agree(compiled, eager, ids: torch.Tensor, rtol: float, **given) -> float:
    """A step of a compiled model and of an equal one that is not compiled; gives the loss."""
    loss, gradients = step(eager, ids, **given)
    got, others = step(compiled, ids, **given)
    torch.testing.assert_close(got, loss, rtol=rtol, atol=0.0)
    assert_gradients_agree({name.removeprefix("_orig_mod."): g for name, g in others.items()}, gradients, rtol)
    return loss.item()


def test_compiled_steps_follow_lengths_modes_and_packing():
    model, *_ = extended(num_hidden_layers=2)
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def agree(ids, **given) -> float:
        return assert_steps_agree(compiled, eager, ids, 1e-5, **given)

    model.train(), eager.train()
    for length in (LENGTH, 33, 47, 21, 64):
        agree(tokens(2, length))
    assert counter.frame_count == 2  # the first length, then all lengths
    ids = tokens(2, LENGTH)
    training = agree(ids)
    model.eval(), eager.eval()
    assert abs(agree(ids) - training) > 1e-3
    model.train(), eager.train()
    assert agree(ids) == training
    assert abs(agree(ids, position_ids=POSITIONS) - training) > 1e-3
    agree(ids[:1], position_ids=POSITIONS[:1], **BY_BORDERS)


@pytest.mark.parametrize("reentrant", [True, False])
def test_compiled_steps_are_checkpointed(reentrant):
    model, *_ = extended(num_hidden_layers=1)
    eager = copy.deepcopy(model).train()
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_steps_agree(compiled, eager, tokens(2, LENGTH), 1e-5)


def test_inductor_compiles_an_autocast_step():
    model, *_ = extended(num_hidden_layers=1)
    eager = copy.deepcopy(model).train()
    torch._dynamo.reset()
    compiled = torch.compile(model.train(), fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_steps_agree(compiled, eager, tokens(2, LENGTH), 5e-2)


def test_evaluation_between_steps_serves():
    model, *_ = extended()
    ids = tokens(2, LENGTH)
    expected = []
    for training, grad in ((True, True), (True, False), (False, False), (True, True)):
        model.train(training)
        with calls_seen() as calls, torch.set_grad_enabled(grad):
            model(ids)
        expected.append(patterns_called(calls) == each_layer(model, TRAINING if training else SERVING))
    assert expected == [True] * 4


def test_patterns_are_equal_in_both_modes_where_a_plan_has_one():
    model, *_ = extended(plan=Plan(attention=SERVING, tokens={"tokens": ["<a>"]}))
    with calls_seen() as calls:
        model.train()(tokens(1, LENGTH))
    assert patterns_called(calls) == each_layer(model, SERVING)
