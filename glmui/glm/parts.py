"""What the networks of ChatGLM-6B and ChatGLM2 have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmui.glm.cache import KVCache, Prefix
from glmui.glm.config import AnyConfig
from glmui.types import PIECE

Rotary = tuple[Tensor, Tensor]


class Network(nn.Module):
    """What the two have in common for those who use them.

    EMBEDDING, BLOCKS, NORM, HEAD: the parts' names; `tied` where the head is the embedding.
    cache_dtype: what new caches keep keys and values in; None for what they are computed in.
    prefix: what new caches begin with. piece: tokens of a prompt worked on at a time.
    """

    EMBEDDING, BLOCKS, NORM, HEAD = "", "", "", ""
    tied = False

    cache_dtype: torch.dtype | None = None
    prefix: Prefix | None = None
    piece = PIECE
    config: AnyConfig

    @property
    def device(self) -> torch.device:
        """Where ids go and logits come from. (The embedding may be elsewhere: see look_up.)"""
        return self.get_submodule(self.NORM).get_parameter("weight").device

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The embedding, each block, the last norm, and a head of its own, with their names."""
        yield self.EMBEDDING, self.get_submodule(self.EMBEDDING)
        for place, block in enumerate(self.get_submodule(self.BLOCKS).children()):
            yield f"{self.BLOCKS}.{place}", block
        for name in (self.NORM,) if self.tied else (self.NORM, self.HEAD):
            yield name, self.get_submodule(name)

    def tie(self) -> None:
        """Make the output head use the embedding's tensors (a quantised one has two), where it is tied."""
        if self.tied:
            for name, tensor in self.get_submodule(self.EMBEDDING).named_parameters():
                setattr(self.get_submodule(self.HEAD), name, tensor)

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for `capacity` tokens."""
        return KVCache(self.config.num_layers, capacity, self.cache_dtype, self.prefix)


def word_embeddings(count: int, size: int) -> nn.Embedding:
    """A table of random vectors. (nn.Embedding's own normal_ would import torch's compiler on the meta
    device, which is half of a load's time.)"""
    return nn.Embedding(count, size, _weight=torch.empty(count, size).uniform_(-1, 1))


class Head(nn.Linear):
    """The output head. Its weight may be kept in fewer bits than are computed in: then blocks of it are
    widened one at a time, so that exactness costs no second copy."""

    BLOCK = 1 << 20  # values: 4 MiB in float32

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] → logits [..., V] in x's dtype."""
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight)
        logits = x.new_empty(*x.shape[:-1], self.out_features)
        step = max(1, self.BLOCK // self.in_features)
        for first in range(0, self.out_features, step):
            rows = self.weight[first : first + step].to(x.dtype)
            logits[..., first : first + step] = F.linear(x, rows)
        return logits


def pieces(length: int, most: int) -> list[tuple[int, int]]:
    """Cut `length` tokens into (first, last + 1) of at most `most`."""
    return [(first, min(first + most, length)) for first in range(0, length, most)]


def look_up(table: nn.Module, ids: Tensor) -> Tensor:
    """The rows of `ids`, on the table's own device. That may be another than all else's: a large table need
    not take a card's memory for the few rows that are asked for."""
    weight = table.get_parameter("weight")
    rows: Tensor = table(ids if weight.is_meta else ids.to(weight.device))
    return rows


def beside(weight: Tensor, x: Tensor) -> Tensor:
    """x in the device and dtype of `weight`: parts of a model may differ in both.

    A weight on "meta" has been put away by accelerate, which moves inputs by itself.
    """
    return x if weight.is_meta else x.to(weight)


def ticker(total: int, report: Callable[[float], None] | None) -> Callable[[], None]:
    """A function that reports the part done each time it is called, `total` times in all."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if report is not None:
            report(done / total)

    return tick
