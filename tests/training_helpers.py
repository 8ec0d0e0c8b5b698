"""Extended models that are trained, what is recorded of their calls, and how gradients are compared."""

from __future__ import annotations

from collections import Counter

import torch
from hf_models import build, build_tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longattn.pattern import parse_patterns
from longattn.plan import Plan
from longattn.surgery import extend

SERVING = "window:9"
TRAINING = "group:6+shift, window:5+sinks:1"
NEW = ["<a>", "<b>"]
PLAN = Plan(
    rope={"rope_type": "yarn", "factor": 4.0}, attention=SERVING, train_attention=TRAINING, tokens={"tokens": NEW}
)


def extended(
    family: str = "llama", dtype: torch.dtype = torch.float32, plan: Plan = PLAN, **fields
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]:
    """A model changed in all that a plan can change, its tokenizer, and the new tokens' ids."""
    model, tokenizer = build(family, dtype, **fields), build_tokenizer()
    report = extend(model, tokenizer, plan)
    return model, tokenizer, list(report.tokens.ids.values())


def patterns_called(calls) -> Counter:
    """How often each layer attended by each pattern, of what `calls_seen` collected."""
    return Counter((module.layer_idx, str(pattern)) for module, pattern in calls)


def each_layer(model: PreTrainedModel, patterns: str, times: int = 1) -> Counter:
    """What `patterns_called` gives when every layer attended so often by a plan's patterns."""
    parsed = parse_patterns(patterns, model.config.num_hidden_layers)
    return Counter({(layer, str(pattern)): times for layer, pattern in enumerate(parsed)})


def take_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients that a backward left, by parameter; the model is left with none."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_gradients_agree(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    # a key's bias moves all scores of a query alike: its gradient is nothing but rounding, so sizes are those of all
    size = max(float(gradient.norm()) for gradient in expected.values())
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        error = float((got[name] - gradient).norm())
        assert error <= rtol * max(float(gradient.norm()), 1e-2 * size), f"{name}: {error / size:.1e}"
