"""A stand-in for CUDA graphs: what was computed once is computed again in the same memory, nothing else.

As in a graph, what Python decided while it was recorded stays as it was: addresses, sizes, numbers. So a
token or a length that is not read from memory shows, as does a cache that has moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glmui.quant.kernels.cuda.driver import Arguments, Function, Module, Size


class EmulatedGraphs:
    """A recorder of graphs (card_step.Record), and all that it recorded."""

    def __init__(self) -> None:
        self.made: list[EmulatedGraph] = []
        self.recording: EmulatedGraph | None = None

    def __call__(self, run: Callable[[], Tensor], device: torch.device) -> tuple[EmulatedGraph, Tensor]:
        graph = self.recording = EmulatedGraph()
        self.made.append(graph)
        try:
            with _Operations(graph):
                return graph, run()
        finally:
            self.recording = None

    def watch(self, module: Module) -> Module:
        """The module, whose launches are recorded."""
        return _Watched(module, self)


class EmulatedGraph:
    """launches: of kernels, by their names. live: not reset yet."""

    def __init__(self) -> None:
        self.live, self.replays = True, 0
        self.launches: list[str] = []
        self.steps: list[Callable[[], None]] = []

    def replay(self) -> None:
        assert self.live, "a graph that was reset cannot be replayed"
        self.replays += 1
        for step in self.steps:
            step()

    def reset(self) -> None:
        self.live, self.steps = False, []


class _Operations(TorchDispatchMode):
    """torch's own operations, each with the tensor it gave: its memory stays, as in a graph's pool."""

    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = func(*args, **kwargs)

        def again() -> None:
            if "empty" in func.name():  # nothing but memory, which was taken
                return
            found = func(*args, **kwargs)
            if isinstance(given, Tensor):
                given.copy_(found)

        self._graph.steps.append(again)
        return given


class _Watched:
    def __init__(self, module: Module, graphs: EmulatedGraphs) -> None:
        self._module, self._graphs = module, graphs

    def function(self, name: str) -> Function:
        function = self._module.function(name)

        def start(grid: Size, block: Size, shared: int, arguments: Arguments) -> None:
            function(grid, block, shared, arguments)
            if (graph := self._graphs.recording) is not None:
                graph.launches.append(name)
                graph.steps.append(lambda: function(grid, block, shared, arguments))

        return start
