"""The KV cache: every layer's keys and values, in memory taken once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens to leave room for beyond what is needed at once.
SPARE = 256


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Keys and values that stand before those of all tokens (P-Tuning v2, prefix.py).

    entries: float [2 * layers, heads, s, head_size], the keys of layer l at 2 l, its values at 2 l + 1.
    """

    entries: Tensor

    @property
    def length(self) -> int:
        return self.entries.shape[2]

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [heads, s, head_size] each."""
        return self.entries[2 * layer], self.entries[2 * layer + 1]


class KVCache:
    """Room for `capacity` tokens in each of `layers` layers.

    A layer's memory is taken at its first write, on the device of what is written, in `dtype` or, where that
    is None, in the dtype of what is written: two tensors [batch, heads, capacity, head_size]. At full size
    a token takes 448 KiB in float16. `length` tokens are valid in all layers; the model moves it on once per
    forward pass. The `front` entries of a prefix lie before them, and are counted in neither of the two.
    """

    def __init__(
        self, layers: int, capacity: int, dtype: torch.dtype | None = None, prefix: Prefix | None = None
    ) -> None:
        self.capacity, self.dtype = capacity, dtype
        self.front = prefix.length if prefix else 0
        self._prefix = prefix
        self.length = 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [batch, n, heads, head_size] at start..start+n-1.

        Raises ValueError when they do not fit.
        """
        batch, count, heads, size = keys.shape
        end = start + count
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, not {end}")
        room = self._layers[layer]
        if room is None:
            shape = (batch, heads, self.front + self.capacity, size)
            dtype = self.dtype or keys.dtype
            room = (keys.new_empty(shape, dtype=dtype), values.new_empty(shape, dtype=dtype))
            self._layers[layer] = room
            if self._prefix is not None:
                for part, entries in zip(room, self._prefix.of(layer), strict=True):
                    part[:, :, : self.front] = entries
        start, end = self.front + start, self.front + end
        room[0][:, :, start:end] = keys.transpose(1, 2)
        room[1][:, :, start:end] = values.transpose(1, 2)

    def read(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """The layer's first `end` keys and values after the prefix's, [batch, heads, front + end, head_size]
        each, without a copy."""
        room = self._layers[layer]
        if room is None:
            raise ValueError(f"layer {layer} has no keys yet")
        end += self.front
        return room[0][:, :, :end], room[1][:, :, :end]

    def make_room(self, count: int) -> None:
        """See that `count` more tokens fit, growing by a quarter or more, one layer after the other."""
        if self.length + count <= self.capacity:
            return
        self.capacity = max(self.length + count, self.capacity + max(SPARE, self.capacity // 4))
        self._replace(self._moved)

    def reorder(self, rows: Tensor) -> None:
        """Make row i of the batch what row rows[i] was (for beam search)."""
        self._replace(lambda x: x.index_select(0, rows.to(x.device)))

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer, room in enumerate(self._layers):
            if room is not None:
                self._layers[layer] = change(room[0]), change(room[1])

    def _moved(self, old: Tensor) -> Tensor:
        new = old.new_empty(*old.shape[:2], self.front + self.capacity, old.shape[3])
        kept = self.front + self.length
        new[:, :, :kept] = old[:, :, :kept]
        return new

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens; their room is written over."""
        self.length = min(self.length, length)
