"""Models whose rotary embedding can't be swapped: each refused by name, and left as it was."""

import functools

import pytest
import torch
from fused_helpers import state_of
from hf_models import build
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.models.llama import modeling_llama

from longattn.hf import use_fused_rope


@pytest.fixture
def stock():
    return build("llama")


def deepseek():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8)
    widths = dict(qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **widths))


def several_models():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    text = dict(**sizes, vocab_size=16, num_key_value_heads=1, head_dim=8)
    vision = dict(**sizes, image_size=28, patch_size=14)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


SMALL = dict(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


@pytest.mark.parametrize(
    "make, message",
    [
        (deepseek, "model_type 'deepseek_v3' is not served: its keys are compressed"),
        (several_models, "model_type 'gemma3' is not served: it is made of several models"),
        (lambda: BertModel(BertConfig(**SMALL)), "model_type 'bert' is not served"),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2)), "'gpt2' is not served"),
    ],
)
def test_other_families_are_refused_by_name(make, message):
    model = make()
    state = state_of(model)
    with pytest.raises(ValueError, match=f"use_fused_rope: .*{message}"):
        use_fused_rope(model)
    assert state_of(model) == state


def edit_config(model):
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}


def replace_forward(model):
    model.model.layers[2].self_attn.forward = lambda *args, **kwargs: None


def replace_class(model):
    model.model.layers[3].self_attn.__class__ = type("Own", (modeling_llama.LlamaAttention,), {"forward": print})


def decorate_forward(model):
    """As a decorator would that keeps what it wraps elsewhere than in its closure."""
    held = [modeling_llama.LlamaAttention.forward]
    forward = functools.wraps(held[0])(lambda *args, **kwargs: held[0](*args, **kwargs))
    model.model.layers[3].self_attn.__class__ = type("Own", (modeling_llama.LlamaAttention,), {"forward": forward})


def replace_rotary(model):
    model.model.rotary_emb = nn.Identity()


@pytest.mark.parametrize(
    "change, message",
    [
        (edit_config, "model.rotary_emb does not turn by the frequencies of config.rope_parameters .*500000"),
        (replace_forward, "a LlamaAttention has another forward than its class"),
        (replace_class, "the forward of Own does not call apply_rotary_pos_emb once"),
        (decorate_forward, "the forward of Own does not call apply_rotary_pos_emb once"),
        (replace_rotary, "a llama of 4 layers must have a rotary module and as many attention modules, got 0 and 4"),
    ],
)
def test_changed_models_are_refused_whole(stock, change, message):
    change(stock)
    state = state_of(stock)
    with pytest.raises(ValueError, match=f"use_fused_rope: {message}"):
        use_fused_rope(stock)
    assert state_of(stock) == state


def test_another_rotation_is_refused(stock, monkeypatch):
    def backwards(q, k, cos, sin):
        return rotate(q, k, cos, -sin)

    rotate = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", backwards)
    with pytest.raises(ValueError, match="LlamaAttention rotates in another way than longattn.apply_rope"):
        use_fused_rope(stock)


def test_models_without_weights_and_wrappers_are_refused(stock):
    with torch.device("meta"):
        empty = type(stock)(stock.config)
    with pytest.raises(ValueError, match="use_fused_rope: model.rotary_emb is on the meta device"):
        use_fused_rope(empty)
    with pytest.raises(TypeError, match="use_fused_rope: model must be a transformers PreTrainedModel, got Sequential"):
        use_fused_rope(nn.Sequential(stock))
