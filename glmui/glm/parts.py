"""What the networks of ChatGLM-6B and ChatGLM2 have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Tokens worked on at a time in a long prompt: bounds memory, and how long Stop waits. A model's `piece` may
# be another number.
PIECE = 256

Rotary = tuple[Tensor, Tensor]


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
