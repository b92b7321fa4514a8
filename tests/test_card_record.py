"""Recording a CUDA graph: what torch is asked, and how it is left where that fails."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from glmui.engine import card_step
from glmui.engine.card_step import record

POOL = (0, 7)


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.name, self.device_index, self._cuda = name, 1, cuda

    def wait_stream(self, other: Stream) -> None:
        self._cuda.done.append(f"{self.name} waits for {other.name}")


class Cuda:
    """torch.cuda as far as recording asks it. As torch's own, its graph stays on the side stream and leaves
    its pool open where a capture cannot be ended.

    fails: "capture" for a capture that the driver gives up, "begin" for one that it does not begin.
    """

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.done: list[str] = []
        self.made = 0
        self.here = self.current = Stream(self, "ours")
        self.open: set[tuple[int, int]] = set()
        self.workspaces = {"ours": "memory"}  # by stream: where cuBLAS's memory was taken from
        self.recorded: list[str] = []  # and that of what was captured

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.done.append(str(device))
        yield
        self.done.append(f"end of {device}")

    def current_stream(self) -> Stream:
        return self.current

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    def new_stream(self, device: torch.device) -> Stream:
        self.made += 1
        return Stream(self, "side")

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        self.done.append(stream.name)
        yield
        self.current = before
        self.done.append(f"end of {stream.name}")

    @contextmanager
    def graph(self, *args: object, **kwargs: object) -> Iterator[None]:
        inspect.signature(GRAPH).bind(*args, **kwargs)
        assert args == ("graph",)
        assert kwargs.get("pool", POOL) == POOL
        stream = kwargs["stream"]
        assert isinstance(stream, Stream)
        before, self.current = self.current, stream
        self.open.add(POOL)
        if self.fails == "begin":
            raise RuntimeError("operation would make the legacy stream depend on a capturing one")
        self.done.append("graph")
        try:
            yield
        finally:
            if self.fails == "capture":
                raise RuntimeError("operation failed due to a previous error during capture")
            self.open.discard(POOL)
        self.current = before
        self.done.append("end of graph")

    def end_allocate(self, device: int, pool: tuple[int, int]) -> None:
        if (device, pool) != (1, POOL) or pool not in self.open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open.discard(pool)

    def run(self) -> Tensor:
        """A product by cuBLAS."""
        self.done.append("run")
        self.workspaces.setdefault(self.current.name, "pool" if self.open else "memory")
        if self.open:
            self.recorded.append(self.workspaces[self.current.name])
        return torch.tensor([self.done.count("run")])


GRAPH = torch.cuda.graph


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    fake = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", fake.new_stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
    for name in ("device", "current_stream", "set_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", fake.workspaces.clear, raising=False)
    card_step._recording_stream.cache_clear()
    yield fake
    card_step._recording_stream.cache_clear()


DEVICE = torch.device("cuda:1")


def test_recording_warms_up_beside_and_records_once(cuda: Cuda) -> None:
    """What a card would be asked, as torch's notes on CUDA graphs have it."""
    graph, logits = record(cuda.run, DEVICE)
    assert (str(graph), logits.item()) == ("graph", 3)
    assert cuda.done == [
        "cuda:1", "side waits for ours", "side", "run", "run", "end of side", "ours waits for side",
        "graph", "run", "end of graph", "end of cuda:1",
    ]  # fmt: skip
    record(cuda.run, DEVICE)
    assert cuda.made == 1  # libraries keep memory for each that they ever met
    assert (cuda.current, cuda.open) == (cuda.here, set())


def test_what_cublas_works_in_is_the_graphs_own(cuda: Cuda) -> None:
    """Shared by stream it would go with the first graph that goes (pytorch issue 193402)."""
    for _ in range(2):
        record(cuda.run, DEVICE)
    assert cuda.recorded == ["pool", "pool"]
    assert not cuda.workspaces  # what comes next takes its own, and not a graph's


def test_torch_may_have_no_way_to_forget_what_cublas_works_in(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces")
    assert record(cuda.run, DEVICE)[1].item() == 3


@pytest.mark.parametrize("fails", ["capture", "begin"])
def test_a_recording_that_fails_leaves_torch_as_it_was(cuda: Cuda, fails: str) -> None:
    cuda.fails = fails
    with pytest.raises(RuntimeError, match="captur"):
        record(cuda.run, DEVICE)
    assert cuda.current is cuda.here
    assert not cuda.open, "torch's allocator would never free what it keeps before it gives up"
    assert "pool" not in cuda.workspaces.values()


def test_an_error_of_what_is_recorded_comes_through(cuda: Cuda) -> None:
    """The capture itself ends well, its pool is closed: nothing is left to do."""

    def fails() -> Tensor:
        if cuda.open:
            raise ValueError("no kernel")
        return cuda.run()

    with pytest.raises(ValueError, match="no kernel"):
        record(fails, DEVICE)
    assert (cuda.current, cuda.open) == (cuda.here, set())
