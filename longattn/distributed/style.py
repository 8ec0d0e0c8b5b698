"""Context parallelism of a whole model: which group an attention module's sequence is sharded over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from longattn.distributed.agreement import refuse
from longattn.distributed.attention import Group, group_attention, process_group, window_attention
from longattn.distributed.ulysses import ulysses
from longattn.ops.window_attention import window_attention as plain_window_attention
from longattn.pattern import Pattern

__all__ = ["ContextParallel", "Full", "Shards", "parallelize", "release", "shards_of"]

Full = Literal["gather", "ulysses"]
ATTRIBUTE = "longattn_shards"


@dataclass(frozen=True)
class Shards:
    """The group that holds an attention module's sequence in equal shards, and how layers that see all keys get them.

    It lives on the module, since checkpointing runs a forward again during backward, outside of any context; the group
    by its name, so that a model keeps no group alive that was destroyed, and can be copied.
    """

    group: str
    rank: int
    ranks: int
    full: Full = "gather"

    def attend(
        self,
        pattern: Pattern,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Attention of a pattern over the sharded sequence, causal.

        Args:
            query, key, value: this rank's shard.
            attention_mask: must be None.
            position_ids: (1 or B, S), those of the shard in the whole sequence, or in its documents.
            cu_seqlens: borders of the documents in the whole sequence, int32.
        """
        self._check(query, key, attention_mask, position_ids)
        logits: dict[str, Any] = dict(scale=scale, softcap=softcap)
        rows: dict[str, Any] = dict(position_ids=position_ids, cu_seqlens=cu_seqlens)
        if pattern.kind == "full" and self.full == "ulysses":
            attend = _attend_to_all(cu_seqlens, logits)
            return ulysses(attend, query, key, value, sink_logits, self.group, self.rank, self.ranks, **rows)
        if pattern.sinks and cu_seqlens is not None:
            rows["cu_seqlens"] = cu_seqlens.cpu()  # whose sinks lie on other ranks is planned by the host
        shared = dict(sink_tokens=pattern.sinks, sink_logits=sink_logits, group=self.group, **rows, **logits)
        if pattern.kind == "group":
            return group_attention(query, key, value, pattern.size, shift=pattern.shift, **shared)
        return window_attention(query, key, value, (-1, 0) if pattern.kind == "full" else pattern.size, **shared)

    def _check(self, query: Tensor, key: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        wrong = None
        if attention_mask is not None:
            wrong = "a sharded sequence takes no attention_mask; shard_batch pads on the right, which needs none"
        elif key.shape[2] != query.shape[2]:
            wrong = (
                f"a sharded sequence is attended to in one call, got a cache with {key.shape[2] - query.shape[2]} "
                "earlier keys; decode on one rank after longattn.distributed.prefill and release"
            )
        elif position_ids is None:
            wrong = "a sharded sequence needs the position_ids that shard_batch gives, got None"
        if wrong is None:
            return
        error = ValueError(f"longattn: {wrong}")
        if torch.compiler.is_compiling():
            raise error
        refuse(process_group("longattn", self.group), query.device.type, "longattn", error)


def _attend_to_all(cu_seqlens: Tensor | None, logits: dict[str, Any]) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, sink_logits: Tensor | None) -> Tensor:
        borders = None if cu_seqlens is None else cu_seqlens.to(query.device)
        return plain_window_attention(query, key, value, (-1, 0), sink_logits=sink_logits, cu_seqlens=borders, **logits)

    return attend


class ContextParallel(ParallelStyle):
    """Have an attention module attend over a sequence that is sharded over the ranks of a mesh.

    For `torch.distributed.tensor.parallel.parallelize_module`; the module's model was changed by `longattn.extend`, or
    loaded with `attn_implementation="longattn"`. Batches come from `shard_batch`.

    Args:
        full: how layers that see all keys get them: "gather" receives all keys before the shard, up to
            2 Hkv D (N - S) numbers a layer, and the last rank has twice the mean work; "ulysses" trades tokens for
            heads, 2 (Hq + Hkv) D S (P - 1) / P numbers sent and the same work for all, and needs Hkv to be a multiple
            of P. The time of both grows with N a rank; that of windows and groups does not.

    Example:
        >>> plan = {"model.layers.*.self_attn": ContextParallel()}
        >>> parallelize_module(model, mesh["cp"], plan)  # doctest: +SKIP
    """

    def __init__(self, *, full: Full = "gather") -> None:
        if full not in ("gather", "ulysses"):
            raise ValueError(f"ContextParallel: full must be 'gather' or 'ulysses', got {full!r}")
        self.full: Full = full

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _set(module, process_group("ContextParallel", device_mesh), self.full)
        return module


def parallelize(model: nn.Module, group: Group, *, full: Full = "gather") -> None:
    """Give `ContextParallel` to all attention modules of a model, whatever its family, and wrappers around it.

    Args:
        model: changed by `longattn.extend`; wrapped by PEFT or not, before or after `fully_shard`.
        group: the ranks that hold a sequence, as for `window_attention`.
        full: as for `ContextParallel`.

    Raises:
        ValueError: the model has no attention module that longattn serves.

    Example:
        >>> parallelize(model, mesh["cp"])  # doctest: +SKIP
    """
    from longattn.hf.families import attention_modules

    style = ContextParallel(full=full)
    modules = attention_modules(model)
    if not modules:
        raise ValueError(f"parallelize: model must have attention modules of transformers, got {type(model).__name__}")
    for module in modules:
        _set(module, process_group("parallelize", group), style.full)


def release(model: nn.Module) -> None:
    """Have a model attend on one rank again.

    Args:
        model: given to `parallelize` or `parallelize_module`.

    Example:
        >>> release(model)  # doctest: +SKIP
    """
    for module in model.modules():
        if hasattr(module, ATTRIBUTE):
            delattr(module, ATTRIBUTE)


def shards_of(module: nn.Module) -> Shards | None:
    """What an attention module was given; None where it attends on one rank."""
    return getattr(module, ATTRIBUTE, None)


def _set(module: nn.Module, group: dist.ProcessGroup, full: Full) -> None:
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if not hasattr(module, "layer_idx") or implementation != "longattn":
        raise ValueError(
            "ContextParallel: module must be an attention module of a model that longattn.extend gave patterns, or "
            f"loaded with attn_implementation='longattn', got {type(module).__name__} with {implementation!r}"
        )
    shards = Shards(group.group_name, dist.get_rank(group), dist.get_world_size(group), full)
    setattr(module, ATTRIBUTE, shards)
