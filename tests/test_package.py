"""What `import longattn` does and does not do, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest

import longattn


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_no_extra_and_prints_nothing():
    heavy = ["transformers", "matplotlib", "typer", "rich", "yaml", "safetensors", "tokenizers", "torch._inductor"]
    code = f"import sys, longattn; print([name for name in {heavy} if name in sys.modules])"
    assert run(code) == "[]\n"


@pytest.mark.parametrize(
    "imports",
    [
        "import longattn; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import longattn",
        "import transformers.modeling_utils; import longattn",
        "import longattn.hf",
    ],
)
def test_transformers_knows_longattn_in_any_order_of_imports(imports):
    code = f"{imports}\nfrom transformers import LlamaForCausalLM, AttentionInterface\n"
    code += "import inspect, transformers.modeling_utils as m\n"
    code += "print('longattn' in AttentionInterface().valid_keys(), 'class PreTrainedModel' in inspect.getsource(m))"
    assert run(code) == "True True\n"


def test_public_names_exist():
    for name in longattn.__all__:
        assert getattr(longattn, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = longattn.nothing
