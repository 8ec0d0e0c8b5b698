"""transformers' Trainer for sequences that are sharded over ranks; changes with Trainer's and accelerate's hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Trainer

from longattn.distributed.batch import shard_batch
from longattn.distributed.style import Full, parallelize

__all__ = ["ContextParallelTrainer"]


class ContextParallelTrainer(Trainer):
    """transformers' Trainer with longattn's context parallelism in place of torch's.

    accelerate's `ParallelismConfig(cp_size=...)`, given as `TrainingArguments(parallelism_config=...)`, keeps its part:
    the mesh, the same batch on all ranks of a sequence, the scale of the loss, FSDP2 on GPUs; on CPUs, for which
    accelerate has no FSDP2, DistributedDataParallel. What it would do beyond that, head-and-tail shards and a patched
    `scaled_dot_product_attention` that refuses windows, is left out.

    Args:
        full: how layers that see all keys get them, as for `longattn.distributed.ContextParallel`.
        args, kwargs: as for Trainer. Batches hold input_ids and labels, and may hold what `shard_batch` reads.

    Raises:
        ValueError: there is no `cp_size` above 1, or the sizes do not make up all ranks.

    Example:
        >>> config = ParallelismConfig(cp_size=8)  # doctest: +SKIP
        >>> arguments = TrainingArguments(folder, parallelism_config=config)  # doctest: +SKIP
        >>> ContextParallelTrainer(model, arguments, train_dataset=texts).train()  # doctest: +SKIP
    """

    def __init__(self, *args: Any, full: Full = "gather", **kwargs: Any) -> None:
        self._full: Full = full
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        config, world = self.args.parallelism_config, self.args.world_size
        if config is None or not config.cp_enabled or config.total_size != world:
            raise ValueError(
                "ContextParallelTrainer: args.parallelism_config must be a ParallelismConfig with cp_size above 1, "
                f"of {world} ranks in all, got {config}"
            )
        if self.args.device.type == "cpu":
            config._validate_accelerator = lambda accelerator: None  # which refuses CPUs
        super().create_accelerator_and_postprocess()
        self.accelerator._prepare_cp = lambda *prepared: prepared
        self._sequence: DeviceMesh = self.accelerator.torch_device_mesh["cp"]
        parallelize(cast(nn.Module, self.model), self._sequence, full=self._full)

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[[], contextlib.AbstractContextManager[None]], dict[str, Any]]:
        return contextlib.nullcontext, {"use_cache": False, **shard_batch(inputs, self._sequence)}
