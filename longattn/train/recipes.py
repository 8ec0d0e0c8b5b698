"""Which weights learn: LongLoRA's adapters, new rows alone, and how they are folded; changes with PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from peft import LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn

from longattn.hf.families import attention_modules
from longattn.wrappers import check_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["longlora", "longlora_config", "merge", "new_rows"]


def longlora(
    model: PreTrainedModel,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    train_embeddings: bool = True,
    train_norms: bool = True,
    new_tokens: Collection[int] = (),
) -> PeftModel:
    """Give a model LongLoRA's trainable weights: low-rank attention projections, whole embeddings and norms.

    A projection W computes `W x + (alpha / rank) B A x`, of which A and B learn. Which keys a query sees in training
    is the plan's `train_attention`, and is not changed here.

    Args:
        model: any decoder of transformers, extended or not; it is wrapped in place. Extend it first.
        rank: rows of A and columns of B.
        alpha: their scale, times the rank; twice the rank by default, as in the paper's code.
        dropout: of the adapters' inputs in training.
        train_embeddings: whether the input embedding learns as a whole; a tied output embedding stays tied.
        train_norms: whether the norms learn as a whole.
        new_tokens: ids whose rows learn where the matrix does not as a whole: an output embedding of its own, and the
            input embedding without `train_embeddings`.

    Returns:
        PEFT's model around `model`; `merge` folds it.

    Raises:
        TypeError: `model` is no transformers model, or is wrapped already.
        ValueError: it has no linear layers in its attention, an argument is out of range, or an id has no row.

    Reference:
        Chen et al., LongLoRA, 2024, arXiv:2309.12307.

    Example:
        >>> model = longattn.train.longlora(model, rank=8)
        >>> transformers.Trainer(model, arguments, train_dataset=rows).train()
    """
    check_model("longlora", model)
    config = longlora_config(
        model,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        train_embeddings=train_embeddings,
        train_norms=train_norms,
        new_tokens=new_tokens,
    )
    return _adapted(model, config)


def longlora_config(
    model: PreTrainedModel,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    train_embeddings: bool = True,
    train_norms: bool = True,
    new_tokens: Collection[int] = (),
) -> LoraConfig:
    """The same recipe as PEFT's config, for trainers that wrap the model themselves (TRL's `peft_config`).

    Args:
        model: the model whose layers it names; it is left as it is.
        rank, alpha, dropout, train_embeddings, train_norms, new_tokens: as in `longlora`.

    Raises:
        TypeError, ValueError: as `longlora`.

    Example:
        >>> trl.SFTTrainer(model, args=config, train_dataset=texts, peft_config=longattn.train.longlora_config(model))
    """
    check_model("longlora", model)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"longlora: rank must be an int of at least 1, got {rank!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"longlora: dropout must be at least 0 and below 1, got {dropout!r}")
    embedding, tied = _embeddings(model)
    if train_embeddings and tied and embedding not in EMBEDDING_LAYER_NAMES:
        raise ValueError(
            f"longlora: train_embeddings must be False where the output embedding is tied to one that PEFT can't keep "
            f"it tied to ({', '.join(EMBEDDING_LAYER_NAMES)} alone), got {embedding} of a {type(model).__name__}"
        )
    rows = _embedding_names(model) if new_tokens else []
    if train_embeddings:
        rows = [name for name in rows if name != embedding]
    whole = [embedding] if train_embeddings else []
    if train_norms:
        whole += _leaves(name for name, module in model.named_modules() if _is_norm(module))
    ids = _checked_rows("longlora", model, new_tokens) if rows else []
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # a fraction is fine
        lora_dropout=dropout,
        target_modules=_projections(model),
        modules_to_save=whole or None,
        ensure_weight_tying=tied and train_embeddings,
        trainable_token_indices={name: ids for name in rows} or None,
    )


def new_rows(model: PreTrainedModel, ids: Collection[int]) -> PeftModel:
    """Let only some tokens' rows of the embeddings learn, from where they stand.

    Args:
        model: a decoder of transformers, wrapped in place; add the tokens first.
        ids: the tokens, such as `longattn.add_tokens(...).ids.values()`. Their rows of the output embedding learn too,
            where that is a matrix of its own; a tied one follows.

    Returns:
        PEFT's model around `model`; `merge` folds it.

    Raises:
        TypeError: `model` is no transformers model, or is wrapped already.
        ValueError: there are no ids, or one has no row.

    Example:
        >>> report = longattn.add_tokens(model, tokenizer, ["<tool>"], init="subwords")
        >>> model = longattn.train.new_rows(model, report.ids.values())
    """
    check_model("new_rows", model)
    config = TrainableTokensConfig(
        task_type="CAUSAL_LM",
        token_indices=_checked_rows("new_rows", model, ids),
        target_modules=_embedding_names(model),
    )
    return _adapted(model, config)


def merge(model: nn.Module) -> PreTrainedModel:
    """Fold what a recipe trained into the model's own weights, and take PEFT's layers out; other models stay.

    Args:
        model: what `longlora` or `new_rows` gave, or a model without adapters. What was folded keeps its dtype.

    Raises:
        ValueError: the folded weights are not finite.

    Example:
        >>> longattn.train.merge(trainer.model).save_pretrained("tuned")
    """
    if isinstance(model, PeftModel):
        return model.merge_and_unload(safe_merge=True)
    return model  # type: ignore[return-value]


def _adapted(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT ties them, as the recipes ask, and warns all the same
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return get_peft_model(model, config)


def _projections(model: PreTrainedModel) -> list[str]:
    """Names of the attention's linear layers, the last parts alone where those name nothing else."""
    inside = {id(module) for attention in attention_modules(model) for module in attention.modules()}
    linear = {name: id(module) in inside for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = [name for name, in_attention in linear.items() if in_attention]
    if not found:
        raise ValueError(f"longlora: no nn.Linear in the attention of a {type(model).__name__}, nothing to adapt")
    leaves = _leaves(found)
    others = {_leaf(name) for name, in_attention in linear.items() if not in_attention}
    return found if others.intersection(leaves) else leaves


def _is_norm(module: nn.Module) -> bool:
    has_weights = next(module.parameters(recurse=False), None) is not None
    return has_weights and "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def _embeddings(model: PreTrainedModel) -> tuple[str, bool]:
    """The input embedding's name, and whether the output's weights are the same."""
    names = {id(module): _leaf(name) for name, module in model.named_modules()}
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    return names[id(inputs)], outputs is not None and outputs.weight is inputs.weight


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """The names of matrices with a row a token, a tied pair by its input's."""
    name, tied = _embeddings(model)
    outputs = model.get_output_embeddings()
    if outputs is None or tied:
        return [name]
    return [name, *(_leaf(other) for other, module in model.named_modules() if module is outputs)]


def _checked_rows(function: str, model: PreTrainedModel, ids: Collection[int]) -> list[int]:
    rows, found = len(model.get_input_embeddings().weight), sorted(set(ids))  # type: ignore[arg-type]
    if not found:
        raise ValueError(f"{function}: ids must name at least one token, got none")
    bad = [number for number in found if not 0 <= number < rows]
    if bad:
        raise ValueError(f"{function}: ids must be those of rows 0 to {rows - 1}, got {bad[0]}")
    return found


def _leaves(names: Collection[str] | Iterator[str]) -> list[str]:
    return list(dict.fromkeys(_leaf(name) for name in names))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
