"""Read a checkpoint folder: its config, tokenizer, model without weights, embeddings, other files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longattn.shards import PICKLES, Shards, read_tensor

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "GENERATION_CONFIG",
    "TOKENIZER_CONFIG",
    "check_shapes",
    "files_beside_weights",
    "load_config",
    "load_tokenizer",
    "materialise_embeddings",
    "model_without_weights",
    "read_config",
    "read_json",
    "source_folder",
]

# Weights in other formats, or of other tools: they are not changed, so they are not part of a new checkpoint.
OTHER_WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"


def source_folder(src: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint, downloaded where `src` is the id of a model on the Hub.

    Raises:
        OSError: it is no folder, and the Hub has no such model or can't be reached.
        ValueError: it is neither a folder nor could it be an id.
    """
    path = Path(src).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if path.exists():
        raise ValueError(f"extend: SRC must be a checkpoint's folder or a Hub id, got the file {src}")
    others = [f"*{suffix}" for suffix in OTHER_WEIGHTS if suffix != ".safetensors"]
    try:
        return Path(snapshot_download(str(src), ignore_patterns=[*others, "consolidated*", "original/*"]))
    except HFValidationError:
        raise ValueError(f"extend: SRC {src} is neither a folder nor the id of a model on the Hub") from None
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"extend: SRC {src} is no folder here, and as a Hub id it can't be fetched: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"extend: {path.name} is corrupt: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"extend: {path.name} must hold a JSON object, got {type(fields).__name__}")
    return fields


def read_config(source: Path) -> PreTrainedConfig:
    fields = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method", "unknown method")
        raise ValueError(f"extend: SRC {source} is quantised ({method}); extend the original, then quantise the result")
    return load_config(source, "extend")


def load_config(src: str | os.PathLike[str], caller: str) -> PreTrainedConfig:
    """Read the config of a folder or of a model on the Hub.

    Raises:
        OSError: there is none, or it can't be fetched.
        ValueError: transformers refuses what it says.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if Path(src).is_dir() and not Path(src, "config.json").is_file():
        raise FileNotFoundError(f"{caller}: SRC {src} has no config.json, so it is no transformers checkpoint")
    try:
        return AutoConfig.from_pretrained(src, trust_remote_code=False)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"{caller}: the config of SRC {src} can't be read: {reason}") from error
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{caller}: transformers refuses the config of SRC {src}: {reason}") from error


def model_without_weights(config: PreTrainedConfig, source: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if (source / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not any((source / name).is_file() for name in (TOKENIZER_CONFIG, "tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(f"extend: SRC {source} has no tokenizer, so no tokens can be added to it")
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _names(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """What a parameter may be called in a checkpoint, which may have been saved from the decoder without its head."""
    prefix = f"{model.base_model_prefix}."
    return (name, name.removeprefix(prefix)) if name.startswith(prefix) else (name,)


def check_shapes(model: PreTrainedModel, shards: Shards) -> None:
    stored = {tensor.name: tensor for tensor in shards}
    for name, parameter in model.named_parameters():
        for candidate in _names(model, name):
            if candidate in stored and stored[candidate].shape != tuple(parameter.shape):
                raise ValueError(
                    f"extend: config.json makes {candidate} {list(parameter.shape)}, but {stored[candidate].path.name} "
                    f"holds {list(stored[candidate].shape)}"
                )


def materialise_embeddings(model: PreTrainedModel, shards: Shards) -> dict[str, tuple[nn.Module, str]]:
    """Give the input and output embeddings their stored values; returns where each stored tensor went."""
    import torch

    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs.weight
    wanted: list[tuple[Any, str]] = [(inputs, "weight")]
    wanted += [] if outputs is None else [(outputs, name) for name, _ in outputs.named_parameters()]
    names = {module: name for name, module in model.named_modules()}
    homes: dict[str, tuple[nn.Module, str]] = {}
    for module, attribute in wanted:
        candidates = _names(model, f"{names[module]}.{attribute}")
        stored = next((found for name in candidates if (found := shards.find(name)) is not None), None)
        twin = tied and module is outputs and attribute == "weight"
        if stored is None and not twin:
            raise ValueError(f"extend: the checkpoint has no {candidates[0]}, which new tokens need")
        if stored is not None:
            value = torch.nn.Parameter(read_tensor(stored))
            twin_of: Any = inputs.weight
            if twin and not torch.equal(value, twin_of):
                raise ValueError(
                    f"extend: config.json ties the embeddings, but {stored.name} differs from the input embedding; "
                    "save the checkpoint with tie_word_embeddings false first"
                )
            homes[stored.name] = (module, attribute)
            setattr(module, attribute, twin_of if twin else value)
        else:
            outputs.weight = inputs.weight
    return homes


def files_beside_weights(source: Path) -> Iterator[Path]:
    """All files but weights, their index and hidden ones (a download's own notes), relative to the folder."""
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            weights = path.suffix in OTHER_WEIGHTS or name.endswith((".safetensors.index.json", ".bin.index.json"))
            if not weights and not name.startswith("."):
                yield path.relative_to(source)
