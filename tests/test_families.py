"""Every served family, in every mode: beside its own eager attention, and beside dense masks where it is changed."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hf_models import ALL_FAMILIES, LAYERS, assert_agree, build, masked, tokens, under_eager
from torch import Tensor
from transformers import DynamicCache, StaticCache

from longattn.hf.families import FAMILIES, attention_modules
from longattn.pattern import parse_patterns
from longattn.plan import Plan
from longattn.rope import rope_cos_sin, rope_frequencies, rope_layers
from longattn.surgery import extend

# windows narrower and wider than the families' own of 8, sinks, groups; rows far longer than any of them
ATTENTION = "window:5+sinks:2, full, window:12, group:6+shift"
LENGTH = 40
families = pytest.mark.parametrize("family", ALL_FAMILIES)


def rope_plan(family: str) -> dict[str, object]:
    """A change of rope that each family's config takes."""
    if family == "phi3":
        return {"factor": 4.0, "long_factor": [4.0, 6.0]}
    return {"factor": 4.0} if family in ("cwm", "gpt_oss") else {"rope_type": "yarn", "factor": 4.0}


@functools.cache
def changed(family: str):
    """An extended model and its dense reference; tests don't change them."""
    model = build(family)
    extend(model, None, Plan(attention=ATTENTION, rope=rope_plan(family)))
    return model, under_eager(model, parse_patterns(ATTENTION, LAYERS))


@functools.cache
def hooked(family: str):
    """A model that longattn serves with the family's own patterns, and the stock one under eager attention."""
    model, stock = build(family), build(family)
    own = [str(pattern) for pattern in FAMILIES[family].patterns_of(model.config)]
    extend(model, None, Plan(attention=own, train_attention="group:5+shift"))
    stock.set_attn_implementation("eager")
    return model, stock


def left_padded(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """A mask of two rows, the second with 7 tokens of padding; the position ids that go with it; the real tokens."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :7] = 0
    return mask, (mask.cumsum(-1) - 1).clamp(min=0), mask.bool()


@families
@torch.no_grad()
def test_own_patterns_are_those_of_eager_attention(family):
    model, stock = hooked(family)
    ids = tokens(2, 24)
    mask, positions, _ = left_padded(24)
    assert_agree(model(ids).logits, stock(ids).logits, "rows")
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    # eager attention gives NaN for padding in float64
    assert_agree(padded[1:, 7:], stock(ids[1:, 7:]).logits, "padded row")


@families
@torch.no_grad()
def test_without_a_plan_the_model_is_served_as_it_is(family):
    model, stock = build(family), build(family)
    model.set_attn_implementation("longattn")
    stock.set_attn_implementation("eager")
    length = 30 if family == "phi3" else LENGTH  # beyond 32 tokens Phi-3 turns by another table than its cached keys
    ids = tokens(2, length)
    mask, positions, real = left_padded(length)
    # eager attention gives NaN for padding in float64
    expected = torch.cat([stock(ids[:1]).logits[0], stock(ids[1:, 7:]).logits[0]])
    assert_agree(model(ids, attention_mask=mask, position_ids=positions).logits[real], expected, "prefill")
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=length)):
        logits = []
        for start, end in ((0, 15), (15, 16), (16, 24), *((i, i + 1) for i in range(24, length))):
            part = dict(attention_mask=mask[:, :end], position_ids=positions[:, start:end])
            logits.append(model(ids[:, start:end], past_key_values=cache, **part).logits)
        assert_agree(torch.cat(logits, 1)[real], expected, type(cache).__name__)


@families
@torch.no_grad()
def test_changed_structure_is_that_of_dense_masks(family):
    model, dense = changed(family)
    ids = tokens(2, LENGTH)
    assert_agree(model(ids).logits, masked(dense, ids), "rows")
    mask, positions, real = left_padded(LENGTH)
    start = torch.tensor([0, 7], dtype=torch.int32)
    expected = masked(dense, ids, position_ids=positions, kv_start=start)[real]
    assert_agree(model(ids, attention_mask=mask, position_ids=positions).logits[real], expected, "padded rows")
    positions = torch.tensor([[*range(5), *range(29), *range(6)], [0, 0, *range(38)]])
    borders = torch.tensor([0, 5, 34, 40, 41, 42, 80], dtype=torch.int32)
    expected = masked(dense, ids, position_ids=positions, cu_seqlens=borders)
    for use_cache in (False, True):
        assert_agree(model(ids, position_ids=positions, use_cache=use_cache).logits, expected, "packed rows")


@families
@torch.no_grad()
def test_prefill_and_decode_agree_at_every_position(family):
    model, _ = changed(family)
    ids = tokens(2, LENGTH)
    mask, positions, real = left_padded(LENGTH)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    first = 34 if family == "phi3" else 9  # longrope turns all of a text by another table beyond 32 tokens
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH + 3)):
        steps = []
        for end in range(first, LENGTH + 1):
            part = slice(0 if end == first else end - 1, end)
            more = dict(attention_mask=mask[:, :end], position_ids=positions[:, part], past_key_values=cache)
            steps.append(model(ids[:, part], **more).logits)
        assert_agree(torch.cat(steps, 1)[real], expected[real], type(cache).__name__)


@families
@torch.no_grad()
def test_generate_takes_the_most_likely_tokens(family):
    model, _ = changed(family)
    greedy = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = tokens(1, 20)
    got = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    assert torch.equal(got[:, 20:], model(got).logits[:, 19:-1].argmax(-1))
    static = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **greedy)
    assert torch.equal(static, got)


@families
def test_gradients_of_a_step_are_those_of_dense_masks(family):
    model, dense = (copy.deepcopy(one) for one in changed(family))
    ids = tokens(2, 24)
    positions = torch.tensor([[*range(9), *range(15)], [*range(24)]])
    borders = torch.tensor([0, 9, 24, 48], dtype=torch.int32)
    logits = model.train()(ids, position_ids=positions, use_cache=False).logits
    expected = masked(dense.train(), ids, position_ids=positions, cu_seqlens=borders)
    for out in (logits, expected):
        torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        ref = gradients[name].grad
        if ref is None:
            assert parameter.grad is None, name
        else:
            error = (parameter.grad - ref).norm()
            assert error < 1e-5 * ref.norm() + 1e-8, f"{name}: {error:.1e} of {ref.norm():.1e}"
    assert any(name.endswith("sinks") for name in gradients) == (family == "gpt_oss")


@families
@torch.no_grad()
def test_layers_rotate_by_the_frequencies_of_their_type(family):
    model, _ = changed(family)
    config, seen = model.config, {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update({module.layer_idx: kwargs["position_embeddings"]}),
            with_kwargs=True,
        )
        for module in attention_modules(model)
    ]
    positions = torch.tensor([[0, 1, 77, 1000]])
    model(tokens(1, 4), position_ids=positions, use_cache=False)
    for hook in hooks:
        hook.remove()
    ropes = rope_layers(config.rope_parameters)
    assert (None not in ropes) == (family in ("gemma3_text", "olmo3"))
    for layer in range(LAYERS):
        parameters = ropes[None] if None in ropes else ropes[config.layer_types[layer]]
        inv_freq, scaling = rope_frequencies(
            parameters,
            getattr(config, "head_dim", None) or 8,
            max_position_embeddings=config.max_position_embeddings,
            seq_len=1001,
        )
        expected = rope_cos_sin(positions, inv_freq, scaling)
        for got, ref in zip(seen[layer], expected, strict=True):
            if family in ("cohere", "cohere2"):
                ref = ref.repeat_interleave(2, -1)
            elif family != "gpt_oss":
                ref = torch.cat([ref, ref], -1)
            torch.testing.assert_close(got.float(), ref, rtol=0, atol=2e-3)  # phases of stock modules are float32
