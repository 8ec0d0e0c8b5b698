"""What the tensors of a checkpoint are called in the model; changes with how transformers renames them at loading."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Home", "homes_of"]


@dataclass(frozen=True)
class Home:
    """Where a stored tensor goes.

    Args:
        name: of the model's parameter or buffer.
        whole: whether it is that parameter as it is, and not a part of it (one of many experts, say) or another form.
    """

    name: str
    whole: bool


def homes_of(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, Home]:
    """Find for each tensor of a checkpoint the parameter that transformers loads it into.

    Checkpoints keep names that a model's class has had before (GPT-NeoX's `embed_out`), one tensor for each expert
    where the model has one for all, and no prefix where they were saved from the decoder without its head.

    Args:
        model: of the checkpoint's config.
        stored: names in the checkpoint.

    Returns:
        A home for every name; one that the model doesn't know keeps its name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    own = model.state_dict()
    homes = {}
    for name in stored:
        home, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        homes[name] = Home(home, converted is None)
    return homes
