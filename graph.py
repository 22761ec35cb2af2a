"""Acting as one CUDA graph: a query is launched once, not kernel by kernel (paper Sec. 6.4).

A decoding pass of one frame is some three hundred small kernels; on a GPU their launches take
several times as long as their work.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model import AuxVLA


def halve(model: AuxVLA) -> None:
    """Linear weights in bf16, in place: what autocast would make of them in every query."""
    for part in (model.vlm, model.flow_head):
        for module in part.modules() if part is not None else ():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)


class Graphed:
    """A function of tensors, {name: tensor} -> tensors, captured once for each set of shapes.

    What it returns is overwritten by the next call.
    """

    def __init__(self, run: Callable[[dict[str, Tensor]], object]):
        self.run, self.captured = run, {}

    def __call__(self, inputs: dict[str, Tensor]) -> object:
        key = tuple((name, *value.shape) for name, value in inputs.items())
        if key not in self.captured:
            self.captured[key] = self.capture({name: x.clone() for name, x in inputs.items()})
        graph, held, outputs = self.captured[key]
        for name, value in inputs.items():
            held[name].copy_(value)
        graph.replay()
        return outputs

    def capture(self, held: dict[str, Tensor]) -> tuple[torch.cuda.CUDAGraph, dict, object]:
        # Libraries make their workspaces in the first calls, which must not be part of the graph.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self.run(held)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.run(held)
        return graph, held, outputs
