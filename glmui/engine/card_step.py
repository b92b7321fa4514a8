"""One token through a whole model on one card, as a CUDA graph: recorded once, replayed for each token.

Some 230 launches, started one by one from Python, take longer than the card needs to compute them. A graph
starts them all in one call, in the same memory each time. So whatever changes from token to token (which one
it is, its place) is read from memory of the card, and a graph serves as long as the cache stays where it is.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from glmui.engine.card_networks import network_of
from glmui.glm.cache import KVCache
from glmui.glm.checkpoint import AnyModel
from glmui.glm.layout import Causal, Layout
from glmui.glm.parts import look_up
from glmui.quant.kernels.cuda.block import AttentionScratch, BlockKernels, Turns, takes_columns, takes_head
from glmui.quant.kernels.cuda.driver import DriverError

_log = logging.getLogger(__name__)
_WARM_UPS = 2  # before recording, so that libraries take their memory and choose their ways outside of it


class Graph(Protocol):
    """What was recorded (torch.cuda.CUDAGraph)."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


# Records what a function launches on a device: the graph, and the tensor that each replay fills.
Record = Callable[[Callable[[], Tensor], torch.device], tuple[Graph, Tensor]]


def record(run: Callable[[], Tensor], device: torch.device) -> tuple[Graph, Tensor]:
    """See Record; as torch's notes on CUDA graphs have it. Raises RuntimeError or DriverError; torch is then
    on the stream and allocates as it did before."""
    with torch.cuda.device(device):
        side, here = _recording_stream(device), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                run()
        here.wait_stream(side)
        _forget_workspaces()
        try:
            return _captured(run, side)
        except BaseException:
            torch.cuda.set_stream(here)  # torch leaves this to a capture that ends well
            raise
        finally:
            _forget_workspaces()


def _captured(run: Callable[[], Tensor], side: torch.cuda.Stream) -> tuple[Graph, Tensor]:
    """What `run` launches, as a graph whose memory is a pool of its own."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # Other threads may ask things of the card meanwhile, such as how much of its memory is free.
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            return graph, run()
    except BaseException:
        # A capture that the driver gives up (torch 2.10 to 2.12) stays open in torch's allocator, which then
        # never again frees what it keeps before it says that memory ran out. A closed one is a RuntimeError.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(side.device_index, pool)
        raise


def _forget_workspaces() -> None:
    """Have cuBLAS take its memory anew at its next product, where that is.

    torch keeps it by stream, and takes it from all who use that stream when one graph that was recorded
    there goes. Forgotten before recording and after, a graph's workspace lies in the graph's own pool, and
    nothing else ever does.
    """
    forget: Callable[[], None] = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    forget()


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream to record on: always the same, for libraries keep memory for each one they ever met."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


def can_step(model: AnyModel, kernels: BlockKernels) -> bool:
    """Whether a CardStep can compute this model, with the cache that it keeps."""
    return is_computable(model, kernels) and takes_cache(model)


def is_computable(model: AnyModel, kernels: BlockKernels) -> bool:
    """Whether all but the embedding is on one device, in a dtype and of sizes that there are kernels for."""
    norm = _first_norm(model)
    rest = [*model.get_submodule(model.BLOCKS).parameters(), *model.get_submodule(model.HEAD).parameters()]
    return (
        all(tensor.device == model.device and not tensor.is_meta for tensor in rest)
        and kernels.takes(norm.dtype)
        and takes_columns(model.config.hidden_size)
        and takes_head(model.config.head_size)
    )


def takes_cache(model: AnyModel) -> bool:
    """Whether it keeps keys and values in what there are kernels for: int8, or what it computes in."""
    return model.cache_dtype in (None, _first_norm(model).dtype, torch.int8)


def _first_norm(model: AnyModel) -> Tensor:
    """A weight of the device and dtype that the model computes in."""
    return model.get_submodule(model.BLOCKS).get_submodule("0.input_layernorm").get_parameter("weight")


@dataclass(frozen=True, slots=True)
class _For:
    """The cache that launches were made for, which is not kept alive: it may go before a larger one comes.
    Its addresses would not tell: memory that was given back and taken again may begin at the same one."""

    cache: weakref.ref[KVCache]
    moves: int

    @classmethod
    def of(cls, cache: KVCache) -> _For:
        return cls(weakref.ref(cache), cache.moves)


def _current(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it, the tensor's card is the current one."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


class CardStep:
    """Logits after one more token, of a model that can_step.

    reason: why its launches are started one by one, a key of the locales' "reasons"; "" where they are not.
    Threads may share it, each with a cache of its own; as a graph belongs to one cache, replies that take
    turns token by token are slow.
    """

    def __init__(self, model: AnyModel, kernels: BlockKernels, record: Record | None = record) -> None:
        self.reason = ""
        self._model, self._kernels, self._record = model, kernels, record
        self._alone = threading.Lock()  # held for a whole token, whose place and id lie in one memory
        self._network = network_of(model, kernels)
        self._now = torch.zeros(2, dtype=torch.int32, device=model.device)  # the token's place, its id
        self._row = self._room_for_row()
        self._layout: Layout | Causal | None = None
        self._turns: Turns | None = None
        self._made: _For | None = None
        self._scratch: AttentionScratch | None = None
        self._graph: Graph | None = None
        self._logits = torch.empty(0)

    @torch.inference_mode()
    def logits(self, token: int, layout: Layout | Causal, cache: KVCache) -> Tensor:
        """[V] after `token`, which is put into the cache behind what it holds. There must be room for it."""
        # The card is made the current one once, and not for each launch on another than the first.
        with self._alone, _current(self._now):
            self._turn(layout, cache.capacity)
            self._feed(token, cache.length)
            if self._made != _For.of(cache):
                self._make(cache)
            if self._graph is None:
                logits = self._run(cache)
            else:
                self._graph.replay()
                logits = self._logits.clone()  # the next replay writes over it
        cache.length += 1
        return logits[0, -1]

    def _room_for_row(self) -> Tensor | None:
        """Where the token's embedding [1, 1, H] is put, if that comes from elsewhere."""
        norm, table = _first_norm(self._model), self._network.embedding.get_parameter("weight")
        return None if table.device == norm.device else norm.new_empty(1, 1, len(norm))

    def _turn(self, layout: Layout | Causal, capacity: int) -> None:
        """Have the angles of all places ready, in the memory that was recorded where they fit it."""
        old = self._turns
        if layout is self._layout and old is not None and len(old.cosine) == capacity:
            return
        angles = self._network.angles(layout, capacity)
        if old is not None and len(old.cosine) == capacity:
            old.cosine.copy_(angles[0])
            old.sine.copy_(angles[1])
        else:
            cosine, sine = (part.to(self._now.device) for part in angles)
            self._turns = Turns(cosine, sine, self._now[:1], self._network.side_by_side)
            self._made = None
        self._layout = layout

    def _feed(self, token: int, place: int) -> None:
        """Tell the card which token it is. (It copies from memory that is not pinned before this returns;
        without `non_blocking` torch would wait besides until the copy has arrived.)"""
        self._now.copy_(torch.tensor([place, token], dtype=torch.int32), non_blocking=True)
        if self._row is not None:
            self._row.copy_(look_up(self._network.embedding, torch.tensor([[token]])), non_blocking=True)

    def _make(self, cache: KVCache) -> None:
        """Record launches for this cache; where that fails, start them one by one from now on."""
        self._forget()
        heads = self._model.config.num_attention_heads
        self._scratch = self._kernels.scratch(heads, cache.room(0))
        if self._record is not None:
            try:
                self._graph, self._logits = self._record(partial(self._run, cache), self._now.device)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, DriverError) as error:
                _log.warning("no CUDA graph: %s", error)
                self._record, self.reason = None, "reasons.card_no_graph"
        self._made = _For.of(cache)

    def _forget(self) -> None:
        """Free what was recorded, and the memory that only it used."""
        self._made = None
        if self._graph is not None:
            self._graph.reset()
        self._graph, self._logits = None, torch.empty(0)

    def _run(self, cache: KVCache) -> Tensor:
        """All launches for one token → [1, 1, V]."""
        row = self._network.embedding(self._now[1:].view(1, 1)) if self._row is None else self._row
        return self._network.logits(row, partial(self._look, cache))

    def _look(self, cache: KVCache, layer: int, numbers: Tensor) -> Tensor:
        assert self._turns is not None
        assert self._scratch is not None
        return self._kernels.attend(numbers, self._turns, cache.room(layer), cache.front, self._scratch)
