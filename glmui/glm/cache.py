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


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """A layer's memory as it lies there: what kernels read and write.

    keys, values: [batch, heads, front + capacity, head_size]. key_scale, value_scale: float16 [batch, heads,
    front + capacity] where those are int8, else None. dtype: of what was written.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    dtype: torch.dtype

    def put(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Write [batch, heads, n, head_size] from entry `start` on."""
        for kept, scale, new in self._parts(keys, values):
            place = slice(start, start + new.shape[2])
            if scale is None:
                kept[:, :, place] = new
            else:
                kept[:, :, place], scale[:, :, place] = in_int8(new)

    def get(self, end: int) -> tuple[Tensor, Tensor]:
        """The first `end` entries; a copy only of what is kept in int8."""
        keys, values = (
            kept[:, :, :end] if scale is None else from_int8(kept[:, :, :end], scale[:, :, :end], self.dtype)
            for kept, scale, _ in self._parts(self.keys, self.values)
        )
        return keys, values

    def changed(self, change: Callable[[Tensor], Tensor]) -> Room:
        """The room with `change` made to each of its tensors."""

        def if_any(scale: Tensor | None) -> Tensor | None:
            return None if scale is None else change(scale)

        scales = if_any(self.key_scale), if_any(self.value_scale)
        return Room(change(self.keys), change(self.values), *scales, self.dtype)

    def _parts(self, keys: Tensor, values: Tensor) -> tuple[tuple[Tensor, Tensor | None, Tensor], ...]:
        return (self.keys, self.key_scale, keys), (self.values, self.value_scale, values)


class KVCache:
    """Room for `capacity` tokens in each of `layers` layers.

    A layer's memory is taken at its first write, or before by `take`, on the device of what is written, in
    `dtype` or, where that is None, in the dtype of what is written. int8 is symmetric, with one scale for
    each token of a head. At full size a token of ChatGLM-6B takes 448 KiB in float16, 227.5 KiB in int8.
    `length` tokens are valid in all layers; the model moves it on once per forward pass. The `front` entries
    of a prefix lie before them, and are counted in neither of the two. most: tokens that it does not grow
    beyond by itself, 0 for no bound. moves: how often a layer's memory was taken, so that whoever holds its
    address knows when it is another one's.
    """

    most = 0
    moves = 0

    def __init__(
        self, layers: int, capacity: int, dtype: torch.dtype | None = None, prefix: Prefix | None = None
    ) -> None:
        self.capacity, self.dtype = capacity, dtype
        self.front = prefix.length if prefix else 0
        self._prefix = prefix
        self.length = 0
        self._layers: list[Room | None] = [None] * layers

    def take(self, layer: int, like: Tensor, batch: int, heads: int, size: int) -> Room:
        """Take a layer's memory now, for keys and values of the dtype and on the device of `like`."""
        shape = (batch, heads, self.front + self.capacity, size)
        dtype = self.dtype or like.dtype

        def scale() -> Tensor | None:
            return like.new_empty(shape[:-1], dtype=torch.float16) if dtype == torch.int8 else None

        keys, values = like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=dtype)
        room = Room(keys, values, scale(), scale(), like.dtype)
        if self._prefix is not None:
            room.put(0, *(entries[None].to(like) for entries in self._prefix.of(layer)))
        self._put(layer, room)
        return room

    def room(self, layer: int) -> Room:
        """The layer's memory, a prefix's entries first. Raises ValueError before any is taken."""
        if (room := self._layers[layer]) is None:
            raise ValueError(f"layer {layer} has no keys yet")
        return room

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [batch, n, heads, head_size] at start..start+n-1.

        Raises ValueError when they do not fit.
        """
        batch, count, heads, size = keys.shape
        if start + count > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, not {start + count}")
        room = self._layers[layer] or self.take(layer, keys, batch, heads, size)
        room.put(self.front + start, keys.transpose(1, 2), values.transpose(1, 2))

    def read(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """The layer's first `end` keys and values after the prefix's, [batch, heads, front + end, head_size]
        each: without a copy, but for int8, which comes in the dtype of what was written."""
        return self.room(layer).get(self.front + end)

    def make_room(self, count: int) -> None:
        """See that `count` more tokens fit, growing by a quarter or more, one layer after the other."""
        if self.length + count <= self.capacity:
            return
        before = self.capacity
        grown = before + max(SPARE, before // 4)
        self.capacity = max(self.length + count, min(grown, self.most or grown))
        try:
            self._replace(self._moved)
        except BaseException:
            # Memory ran out: all that was kept is still there, in some layers with more room.
            self.capacity = before
            raise

    def reorder(self, rows: Tensor) -> None:
        """Make row i of the batch what row rows[i] was (for beam search)."""
        self._replace(lambda x: x.index_select(0, rows.to(x.device)))

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer, room in enumerate(self._layers):
            if room is not None:
                self._put(layer, room.changed(change))

    def _put(self, layer: int, room: Room) -> None:
        self._layers[layer] = room
        self.moves += 1

    def _moved(self, old: Tensor) -> Tensor:
        new = old.new_empty(*old.shape[:2], self.front + self.capacity, *old.shape[3:])
        kept = self.front + self.length
        new[:, :, :kept] = old[:, :, :kept]
        return new

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens; their room is written over."""
        self.length = min(self.length, length)


def in_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] → int8 [..., d] and its float16 scale [...]: max|x| / 127 in float32, then rounded, and
    q = x / rounded scale, half to even. The kernels of a card do the same."""
    scale = (x.abs().amax(-1).float() / 127).half()
    divisor = scale.float().masked_fill(scale == 0, 1)
    q = (x.float() / divisor[..., None]).round_().clamp_(-127, 127)
    return q.to(torch.int8), scale


def from_int8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What in_int8 gave, as numbers."""
    return q.to(dtype).mul_(scale.to(dtype)[..., None])
