"""Read a checkpoint folder: its config, tokenizer, model without weights, embeddings, other files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longattn.checkpoint_names import homes_of
from longattn.shards import PICKLES, Shards, StoredTensor, read_tensor

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "GENERATION_CONFIG",
    "TOKENIZER_CONFIG",
    "check_tensors",
    "check_tokenizer",
    "files_beside_weights",
    "knows_no_text",
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
NOT_FOUND = "SRC {} is no folder here, and as a Hub id it can't be fetched"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"


def source_folder(src: str | os.PathLike[str], pickles: bool = False) -> Path:
    """The folder of a checkpoint, downloaded where `src` is the id of a model on the Hub, with its pickles or without.

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
    wanted = (".safetensors", ".bin") if pickles else (".safetensors",)
    others = [f"*{suffix}" for suffix in OTHER_WEIGHTS if suffix not in wanted]
    try:
        return Path(snapshot_download(str(src), ignore_patterns=[*others, "consolidated*", "original/*"]))
    except HFValidationError:
        raise ValueError(f"extend: SRC {src} is neither a folder nor the id of a model on the Hub") from None
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"extend: {NOT_FOUND.format(src)}: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"extend: {path.name} is corrupt: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"extend: {path.name} must hold a JSON object, got {type(fields).__name__}")
    return fields


def read_config(source: Path) -> PreTrainedConfig:
    fields = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    if quantised := fields.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(f"extend: SRC {source} is quantised ({method}); extend the original, then quantise the result")
    return load_config(source, "extend")


def load_config(src: str | os.PathLike[str], caller: str) -> PreTrainedConfig:
    """Read the config of a folder or of a model on the Hub.

    Raises:
        OSError: there is none, or it can't be fetched.
        ValueError: transformers refuses what it says.
    """
    from transformers import AutoConfig

    if Path(src).is_dir() and not Path(src, "config.json").is_file():
        what = "no transformers checkpoint"
        if Path(src, "adapter_config.json").is_file():
            what = "a PEFT adapter; merge it into its model (merge_and_unload) and save that"
        raise FileNotFoundError(f"{caller}: SRC {src} has no config.json, so it is {what}")
    try:
        return AutoConfig.from_pretrained(src, trust_remote_code=False)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        what = "the config of SRC {} can't be read" if Path(src).exists() else NOT_FOUND
        raise OSError(f"{caller}: {what.format(src)}: {reason}") from error
    except Exception as error:  # a config's values can fail anywhere in a config's code
        reason = " ".join(str(error).split())
        raise ValueError(f"{caller}: transformers refuses the config of SRC {src}: {reason}") from error


def model_without_weights(config: PreTrainedConfig, source: Path, num_tensors: int) -> PreTrainedModel:
    """Build the model that a config describes on the meta device.

    Raises:
        ValueError: transformers can't build it, or it would have more layers than the checkpoint has tensors.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > num_tensors:
        raise ValueError(f"extend: config.json has {layers} layers, but the weights are {num_tensors} tensors")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a config's values can fail anywhere in a model's code
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"extend: transformers builds no causal model of config.json: {reason}") from error
    if (source / GENERATION_CONFIG).is_file():
        read_json(source / GENERATION_CONFIG)
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not any((source / name).is_file() for name in (TOKENIZER_CONFIG, "tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(f"extend: SRC {source} has no tokenizer, so no tokens can be added to it")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more special
        reason = " ".join(str(error).split())
        raise ValueError(f"extend: transformers can't read the tokenizer of SRC {source}: {reason}") from error


def knows_no_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it has special tokens alone: transformers makes such a one, silently, of a folder that has none."""
    return set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer whose bos and eos tokens both have other ids than the model's configs give them.

    One of the two may differ: tuned models often end at a token of their own.

    Raises:
        ValueError: the tokenizer must be another model's.
    """
    differing = []
    for role in ("bos_token_id", "eos_token_id"):
        own = getattr(tokenizer, role, None)
        ids = [getattr(config, role, None) for config in (model.config, model.generation_config)]
        listed = {one for given in ids for one in (given if isinstance(given, list) else [given]) if one is not None}
        if own is None or not listed or own in listed:
            return
        differing.append(f"{role} {own}, not {sorted(listed)}")
    raise ValueError(
        f"extend: the tokenizer must be the model's own, got one with {' and '.join(differing)} of the model's configs"
    )


def check_tensors(model: PreTrainedModel, shards: Shards) -> None:
    """Check that the checkpoint has every tensor that its config asks for, in its shape; it may have others too.

    A checkpoint that was saved from the decoder alone has no output embedding, and need not have it.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    stored = _stored_by_home(model, shards)
    prefix = f"{model.base_model_prefix}."
    has_head = any(tensor.name.startswith(prefix) for tensor in shards)
    twins: dict[int, list[str]] = {}  # tied parameters are one parameter with several names, one of which is enough
    for name, parameter in model.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(name)
    for names in twins.values():
        found = [pair for name in names for pair in stored.get(name, [])]
        if not found and (has_head or any(name.startswith(prefix) for name in names)):
            raise ValueError(f"extend: config.json asks for {names[0]}, but the weights have no tensor of that name")
        shape = list(model.get_parameter(names[0]).shape)
        for tensor, whole in found:
            if whole and list(tensor.shape) != shape:
                raise ValueError(
                    f"extend: config.json makes {tensor.name} {shape}, but {tensor.path.name} holds "
                    f"{list(tensor.shape)}"
                )


def _stored_by_home(model: PreTrainedModel, shards: Shards) -> dict[str, list[tuple[StoredTensor, bool]]]:
    """The stored tensors that go into each parameter, and whether each is all of it, as it is."""
    tensors = {tensor.name: tensor for tensor in shards}
    stored: dict[str, list[tuple[StoredTensor, bool]]] = {}
    for name, home in homes_of(model, tensors).items():
        stored.setdefault(home.name, []).append((tensors[name], home.whole))
    return stored


def materialise_embeddings(model: PreTrainedModel, shards: Shards) -> dict[str, tuple[nn.Module, str]]:
    """Give the input and output embeddings their stored values; returns where each stored tensor went."""
    import torch

    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs.weight
    wanted: list[tuple[Any, str]] = [(inputs, "weight")]
    wanted += [] if outputs is None else [(outputs, name) for name, _ in outputs.named_parameters()]
    names = {module: name for name, module in model.named_modules()}
    by_home = _stored_by_home(model, shards)
    homes: dict[str, tuple[nn.Module, str]] = {}
    for module, attribute in wanted:
        name = f"{names[module]}.{attribute}"
        stored = next((tensor for tensor, whole in by_home.get(name, []) if whole), None)
        twin = tied and module is outputs and attribute == "weight"
        if stored is None and not twin:
            raise ValueError(f"extend: the checkpoint has no {name}, which new tokens need")
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
                if not path.is_file():
                    raise ValueError(f"extend: {path} is no file that can be copied: a broken link, a pipe or a socket")
                yield path.relative_to(source)
