"""Which of transformers' model types are served, and why the others are not."""

from __future__ import annotations

import importlib
import inspect
import json

import pytest
import transformers
from hf_models import ALL_FAMILIES, build
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from longattn.hf.families import FAMILIES, NOT_HOOKED, NOT_SERVED, attention_modules, family_of
from longattn.plan import Plan
from longattn.surgery import extend


def modelling_source(model_type: str) -> str:
    return inspect.getsource(importlib.import_module(getattr(transformers, CAUSAL[model_type]).__module__))


@pytest.mark.parametrize("model_type", sorted(CAUSAL))
def test_every_decoder_of_transformers_is_served_or_refused_with_a_reason(model_type):
    config = CONFIG_MAPPING[model_type].__new__(CONFIG_MAPPING[model_type])
    try:
        config.__init__()
    except Exception:  # the class needs arguments: the name has to be enough for a reason
        config = PreTrainedConfig()
        config.model_type = model_type
    if model_type in FAMILIES:
        assert family_of(config, "extend").model_type == model_type
        return
    refusal = f"model_type '{config.model_type}' is not served: .{{20,}}; served are .*llama"
    with pytest.raises(ValueError, match=refusal):
        family_of(config, "extend")


def test_tables_name_what_transformers_has():
    refused = {name for names in NOT_SERVED.values() for name in names.split()}
    assert not FAMILIES.keys() & (refused | NOT_HOOKED) and not refused & NOT_HOOKED
    since_the_oldest = {"bailing_hybrid", "mistral_large4"}  # came after the oldest transformers that is served
    assert (refused | NOT_HOOKED | FAMILIES.keys()) - since_the_oldest <= set(CONFIG_MAPPING.keys())
    assert set(ALL_FAMILIES) == FAMILIES.keys()
    unhooked = {name for name in CAUSAL if "ALL_ATTENTION_FUNCTIONS" not in modelling_source(name)}
    encoders = {"mvp", "prophetnet"}
    wrappers = {"fuyu", "got_ocr2", "gemma4_assistant", "gemma4_unified_assistant"}
    hooked_since_the_oldest = {"codegen", "gptj"}
    assert unhooked - encoders - wrappers - hooked_since_the_oldest == NOT_HOOKED & CAUSAL.keys()


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("falcon", "does not go through transformers' AttentionInterface"),
        ("gemma3", "made of several models .*text_config.*, such as gemma3_text beside gemma3"),
        ("t5gemma", "it is an encoder-decoder"),
        ("deepseek_v3", "MLA"),
        ("qwen3_next", r"layers that keep no keys of each token, .*\(linear_attention\)"),
        ("gemma3n_text", "attend to the keys of earlier ones"),
        ("gpt2", "no rotary embedding that is built from its config"),
        ("nemotron", "not among those that were compared"),
    ],
)
def test_models_are_refused_by_name_and_reason(model_type, reason):
    with pytest.raises(ValueError, match=f"extend: model_type '{model_type}' is not served: .*{reason}"):
        family_of(CONFIG_MAPPING[model_type](), "extend")


def test_extend_refuses_a_model_before_it_touches_it():
    config = CONFIG_MAPPING["falcon"](hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    model = AutoModelForCausalLM.from_config(config)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match="'falcon' is not served"):
        extend(model, None, Plan(attention="window:4"))
    assert model.config.to_dict() == before


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_attention_modules_are_one_a_layer(family):
    model = build(family)
    assert [module.layer_idx for module in attention_modules(model)] == [0, 1, 2, 3]


def test_layers_of_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"must be full_attention or sliding_attention, got \['chunked_attention'"):
        model = build("qwen3", layer_types=["chunked_attention", *["full_attention"] * 3], sliding_window=None)
        extend(model, None, Plan(attention="window:4"))


def test_doctor_lists_the_served_families():
    testing = pytest.importorskip("typer.testing")
    pytest.importorskip("rich")
    from longattn.cli import app

    result = testing.CliRunner().invoke(app, ["doctor", "--json"])
    listed = {row["model_type"]: row for row in json.loads(result.stdout)["families"]}
    assert listed.keys() == FAMILIES.keys()
    assert listed["cohere2"] == {
        "model_type": "cohere2",
        "windows": "in the layers of layer_types",
        "rope": "interleaved, in the layers with a window",
    }
    assert listed["phi3"]["windows"] == "one for all layers" and "longrope" in listed["phi3"]["rope"]
    table = testing.CliRunner().invoke(app, ["doctor"])
    assert "gemma3_text" in table.output and "Model families" in table.output
