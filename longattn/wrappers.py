"""What may be given as a model: one of transformers' own, and no wrapper around one."""

from __future__ import annotations

from torch import nn

__all__ = ["check_model"]


def check_model(function: str, model: object) -> None:
    """Refuse what is no transformers model, saying when it only wraps or shards one.

    A wrapper (PEFT's, `torch.compile`'s, data parallelism's) may hold the embeddings, configs or forward that it was
    made from, so that a change beneath it would be seen in part; the parts of a model that FSDP2 shards can't run
    alone, so that a change of it could not be looked at.

    Args:
        function: the name that the error starts with.
        model: what was given to it.

    Raises:
        TypeError: `model` is not a transformers model, or is a sharded one.

    Example:
        >>> check_model("extend", model)
    """
    from transformers import PreTrainedModel

    got = type(model).__name__
    if isinstance(model, PreTrainedModel):
        # fully_shard gives a model a class of its own, below FSDPModule, which torch has only where it is distributed
        if any(base.__name__ == "FSDPModule" for base in type(model).__mro__):
            raise TypeError(f"{function}: model must be given before fully_shard, got {got}")
        return
    inner = _wrapped(model, PreTrainedModel)
    if inner is not None:
        got += (
            f" around a {type(inner).__name__}; give the model itself, before adapters, torch.compile or data "
            "parallelism wrap it"
        )
    raise TypeError(f"{function}: model must be a transformers PreTrainedModel, got {got}")


def _wrapped(model: object, kind: type[nn.Module]) -> nn.Module | None:
    """The outermost module of a kind inside another module."""
    if not isinstance(model, nn.Module):
        return None
    return next((module for module in model.modules() if isinstance(module, kind)), None)
