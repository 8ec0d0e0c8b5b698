"""cuDNN's sliding window through its own graphs (nvidia-cudnn-frontend), forward and backward, as an autograd function.

cuDNN counts the query's own key in its left bound, so that a bound of W is a window of W keys.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longattn.bench.cases import Case

__all__ = ["Graphs", "attention"]


class Graphs:
    """The forward and the backward graph of one case; building them needs a GPU, describing them does not."""

    def __init__(self, case: Case) -> None:
        self.cudnn: Any = importlib.import_module("cudnn")
        self.case = case
        self.band = dict(
            attn_scale=case.head_dim**-0.5,
            diagonal_alignment=self.cudnn.diagonal_alignment.BOTTOM_RIGHT,
            diagonal_band_right_bound=0,
        )
        if case.pattern.kind == "window":
            self.band["diagonal_band_left_bound"] = case.pattern.size

    def _graph(self, handle: Any) -> Any:
        types = self.cudnn.data_type
        io = types.BFLOAT16 if self.case.dtype == torch.bfloat16 else types.HALF
        shared = dict(intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT)
        return self.cudnn.pygraph(io_data_type=io, handle=handle, **shared)

    def forward(self, handle: Any, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor) -> Any:
        """Describe the forward: (graph, its tensors in the order of the arguments)."""
        graph = self._graph(handle)
        inputs = [graph.tensor_like(x) for x in (query, key, value)]
        results = graph.sdpa(*inputs, generate_stats=True, name="sdpa", **self.band)
        return graph, [*inputs, *self._outputs(results, (out, stats))]

    def backward(self, handle: Any, tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> Any:
        """Describe the backward of query, key, value, out, gradient of out and stats: (graph, its tensors)."""
        graph = self._graph(handle)
        inputs = [graph.tensor_like(x) for x in tensors]
        results = graph.sdpa_backward(*inputs, name="sdpa_backward", **self.band)
        return graph, [*inputs, *self._outputs(results, grads)]

    def _outputs(self, results: Sequence[Any], like: Sequence[Tensor]) -> Sequence[Any]:
        for result, x in zip(results, like, strict=True):
            result.set_output(True).set_dim(list(x.shape)).set_stride(list(x.stride()))
            if x.dtype == torch.float32:
                result.set_data_type(self.cudnn.data_type.FLOAT)
        return results

    def build(self, graph: Any) -> int:
        """Compile a graph for this GPU; the bytes of workspace it needs."""
        heuristics = self.cudnn.heur_mode
        graph.build([heuristics.A, heuristics.FALLBACK])
        return max(1, graph.get_workspace_size())


def stats_like(query: Tensor) -> Tensor:
    """cuDNN's log-sum-exp, (B, H, S, 1)."""
    return query.new_empty((*query.shape[:3], 1), dtype=torch.float32)


def attention(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of a case; its graphs are built at the first call."""
    if case.pattern.kind == "group" or case.pattern.sinks:
        raise ValueError("windows alone")
    graphs = Graphs(case)
    handle = graphs.cudnn.create_handle()
    built: dict[str, tuple[Any, Sequence[Any], Tensor]] = {}

    def run(name: str, describe: Callable[[], Any], tensors: Sequence[Tensor]) -> None:
        if name not in built:
            graph, nodes = describe()
            built[name] = graph, nodes, torch.empty(graphs.build(graph), dtype=torch.uint8, device=case.device)
        graph, nodes, workspace = built[name]
        graphs.cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(dict(zip(nodes, tensors, strict=True)), workspace, handle=handle)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            tensors = (query, key, value, torch.empty_like(query), stats_like(query))
            run("forward", lambda: graphs.forward(handle, *tensors), tensors)
            ctx.save_for_backward(*tensors)
            return tensors[3]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            query, key, value, out, stats = ctx.saved_tensors
            grads = [torch.empty_like(x) for x in (query, key, value)]
            inputs = query, key, value, out, grad, stats
            run("backward", lambda: graphs.backward(handle, inputs, grads), (*inputs, *grads))
            return tuple(grads)

    return Attention.apply
