"""Training extended models: gradients, checkpointing, which pattern is on when, and compiling the whole model."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import FAMILIES, LAYERS, assert_agree, build, masked, tokens, under_eager
from training_helpers import assert_gradients_agree, take_gradients
from transformers import StaticCache

from longattn.pattern import parse_patterns
from longattn.plan import Plan
from longattn.surgery import extend

SERVING = "window:9"
TRAINING = "group:6+shift, window:5+sinks:1"
LENGTH = 20
POSITIONS = torch.tensor([[*range(5), *range(9), *range(6)], [0, *range(19)]])
BORDERS = torch.tensor([0, 5, 14, 20, 21, 40], dtype=torch.int32)


def trained(family: str):
    """A model with a training pattern of its own, and dense references of the training and the serving pattern."""
    model = build(family)
    extend(model, None, Plan(attention=SERVING, train_attention=TRAINING))
    return model, *(under_eager(model, parse_patterns(patterns, LAYERS)) for patterns in (TRAINING, SERVING))


def gradients(model, logits) -> dict[str, torch.Tensor]:
    weights = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    return take_gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree_with_dense(family):
    model, dense, _ = trained(family)
    model.train()
    ids = tokens(2, LENGTH)
    expected = gradients(dense, masked(dense, ids))
    assert_gradients_agree(gradients(model, model(ids).logits), expected, 1e-5)
    expected = gradients(dense, masked(dense, ids, position_ids=POSITIONS, cu_seqlens=BORDERS))
    for use_cache in (False, True):
        logits = model(ids, position_ids=POSITIONS, use_cache=use_cache).logits
        assert_gradients_agree(gradients(model, logits), expected, 1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family, reentrant):
    model, *_ = trained(family)
    model.train()
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    inputs = [dict(), dict(position_ids=POSITIONS), dict(attention_mask=mask)]
    plain = [gradients(model, model(ids, use_cache=False, **given).logits) for given in inputs]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for given, expected in zip(inputs, plain, strict=True):
        assert_gradients_agree(gradients(model, model(ids, **given).logits), expected, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_training_pattern_follows_the_mode(family):
    model, training, serving = trained(family)
    ids = tokens(2, LENGTH)
    assert_agree(model(ids).logits, masked(serving, ids), "eval")
    assert_agree(model.train()(ids).logits, masked(training, ids), "train")
    assert float((masked(training, ids) - masked(serving, ids)).norm()) > 1
    assert_agree(model.eval()(ids).logits, masked(serving, ids), "eval again")


def test_generate_serves_in_training_mode():
    model, *_ = trained("llama")
    ids = tokens(2, LENGTH)
    greedy = dict(
        max_new_tokens=8, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    expected = model.generate(ids, **greedy)
    got = model.train().generate(ids, **greedy)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(got.logits[0], expected.logits[0])
    assert model.training


def test_attention_dropout_is_refused_in_training():
    model = build("llama", attention_dropout=0.1)
    extend(model, None, Plan(attention="window:9"))
    ids = tokens(1, 8)
    assert model(ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"attention_dropout must be 0\.0 in training, got 0\.1"):
        model.train()(ids)


def test_whole_model_compiles_into_one_graph():
    model = build("llama", torch.float32, num_hidden_layers=2)
    extend(model, None, Plan(attention="window:6+sinks:2, group:5+shift", train_attention="group:8"))
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :5] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = [dict(use_cache=True), dict(attention_mask=mask, use_cache=False), dict(position_ids=POSITIONS)]
    with torch.no_grad():
        for given in inputs:
            torch.testing.assert_close(compiled(ids, **given).logits, model(ids, **given).logits)
    twin = copy.deepcopy(model).train()
    twin(ids, labels=ids, use_cache=False).loss.backward()
    model.train()
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


@torch.no_grad()
def test_static_decode_compiles_into_one_graph():
    model = build("llama", torch.float32, num_hidden_layers=2)
    extend(model, None, Plan(attention="window:6+sinks:2, group:5+shift"))
    ids = tokens(2, LENGTH)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 3)
    logits = [model(ids[:, :8], past_key_values=cache).logits]
    torch._dynamo.reset()
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model, fullgraph=True, backend=count)
    for i in range(8, LENGTH):
        position = torch.full((2, 1), i)
        logits.append(step(ids[:, i : i + 1], past_key_values=cache, position_ids=position).logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


def test_compiled_generate_serves_in_training_mode():
    model = build("llama", torch.float32, num_hidden_layers=1)
    extend(model, None, Plan(attention="window:3", train_attention="group:6"))
    asked = dict(max_new_tokens=1, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_scores=True)
    serving = model.generate(tokens(1, LENGTH), **asked).scores
    model.train()
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    for got, expected in zip(model.generate(tokens(1, LENGTH), **asked).scores, serving, strict=True):
        torch.testing.assert_close(got, expected)
