"""What stands between a block's linear layers, on a card, for one new token: tensors in, tensors out.

Everything is computed in float32 and rounded at the end. Where the token stands is read from memory of the
card, so that one CUDA graph of all launches serves every token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glmui.glm.cache import Room
from glmui.quant.kernels.cuda.driver import Function, Module, Size

MOST_COLUMNS = 8192  # of a norm: 8 for each of 1024 threads
MOST_SIZE = 256  # numbers in a head

_ENDINGS = {torch.float16: "half", torch.bfloat16: "bf16"}
_THREADS = 256
_ATTENTION_THREADS = 128
_SHARING = 4  # query heads of a tile where several share their keys
_CHUNK = 64  # tokens below which a split is not worth its while
_BLOCKS = 2  # of attention, for each of a card's processors; where heads share keys only 3 fit there at once
_PRETENDED = 16  # processors of what is no card


@dataclass(frozen=True, slots=True)
class Turns:
    """Rotary angles, and the place of the new token among them.

    cosine, sine: [places, angles] in the dtype of queries. place: int32 [1], the token's, no prefix counted.
    side_by_side: so a head's query, key and value lie, and both of its halves turn, head_size / 2 angles
    (ChatGLM-6B); else all queries, keys and values follow one another, and a head's first half turns in
    pairs, head_size / 4 angles (ChatGLM2 and 3).
    """

    cosine: Tensor
    sine: Tensor
    place: Tensor
    side_by_side: bool


@dataclass(frozen=True, slots=True)
class AttentionScratch:
    """Where blocks of one launch meet: parts float32 [heads, splits, 2 + size], tickets int32 [tiles], 0."""

    parts: Tensor
    tickets: Tensor


def takes_head(size: int) -> bool:
    """Whether attention is made for heads of so many numbers."""
    return size % 8 == 0 and 0 < size <= MOST_SIZE


def takes_columns(columns: int) -> bool:
    """Whether norms are made for so many columns."""
    return columns % 8 == 0 and 0 < columns <= MOST_COLUMNS


def splits_of(tiles: int, tokens: int, processors: int) -> int:
    """Into how many parts at most a sequence is cut, so that `tiles` of heads fill a card's processors."""
    return max(1, min(-(-tokens // _CHUNK), -(-_BLOCKS * processors // tiles)))


class BlockKernels:
    """The kernels of block.cu and attention.cu on one card. name: such as "sm_86".

    All raise ValueError for shapes, dtypes or devices they are not made for.
    """

    def __init__(self, module: Module, name: str) -> None:
        self.name = name
        self._module = module
        self._functions: dict[str, Function] = {}

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether there are kernels that compute with such numbers."""
        try:
            self._function("norm", dtype)
        except ValueError:
            return False
        return True

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        residual: Tensor | None = None,
        alpha: float = 1,
    ) -> Tensor:
        """LayerNorm of x + alpha residual, [..., columns] → the same shape."""
        return self._norm(x, weight, bias, eps, residual, alpha, None)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """RMSNorm of x + residual, [..., columns] → the same shape; and that sum itself."""
        total = x if residual is None else torch.empty_like(x)
        return self._norm(x, weight, None, eps, residual, 1, None if residual is None else total), total

    def gelu(self, x: Tensor) -> Tensor:
        """GELU in its tanh form, x [...] → the same shape."""
        out, count = torch.empty_like(x), x.numel()
        pointers = _pointer(out, x, x.shape), _pointer(x, x, x.shape)
        self._start("gelu", x, (-(-count // _THREADS), 1, 1), _THREADS, *pointers, c_int(count))
        return out

    def swiglu(self, x: Tensor) -> Tensor:
        """silu of the first half times the second, x [..., 2 columns] → [..., columns]."""
        columns, odd = divmod(x.shape[-1], 2)
        if odd:
            raise ValueError(f"{x.shape[-1]} columns have no halves")
        out = x.new_empty(*x.shape[:-1], columns)
        pointers = _pointer(out, x, out.shape), _pointer(x, x, x.shape)
        grid = -(-columns // _THREADS), x.numel() // (2 * columns), 1
        self._start("swiglu", x, grid, _THREADS, *pointers, c_int(columns))
        return out

    def scratch(self, heads: int, room: Room, processors: int | None = None) -> AttentionScratch:
        """What `attend` needs for so many heads of queries and as many tokens as the room has.

        processors: that work side by side; None for all that the room's card has.
        """
        groups, tokens, size = room.keys.shape[1:]
        device, tiles = room.keys.device, _tiles(heads, groups)
        splits = splits_of(tiles, tokens, _processors(device) if processors is None else processors)
        parts = torch.empty(heads, splits, 2 + size, dtype=torch.float32, device=device)
        return AttentionScratch(parts, torch.zeros(tiles, dtype=torch.int32, device=device))

    def attend(self, row: Tensor, turns: Turns, room: Room, front: int, scratch: AttentionScratch) -> Tensor:
        """What a new token finds among all up to itself → [..., heads * head_size]. Its key and value are
        put into the room first.

        row: [..., width], what query_key_value gave for it. room: of a batch of one, in row's dtype or int8;
        `front` entries of a prefix lie before the tokens.
        """
        _check_attention(row, turns, room, scratch)
        heads, splits, _ = scratch.parts.shape
        groups, capacity, size = room.keys.shape[1:]
        kind = "_shared" if heads > groups else ""
        kept = "" if room.key_scale is None else "_int8"
        out = row.new_empty(*row.shape[:-1], heads * size)
        self._start(
            f"attend{kind}{kept}", row, (len(scratch.tickets), splits, 1), _ATTENTION_THREADS,
            *map(_address, (row, turns.cosine, turns.sine, turns.place)), c_int(front),
            *map(_address, (room.keys, room.values, room.key_scale, room.value_scale)),
            *map(c_int, (capacity, heads, groups, size, turns.side_by_side)),
            *map(_address, (scratch.parts, scratch.tickets, out)),
        )  # fmt: skip
        return out

    def _norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        alpha: float,
        total: Tensor | None,
    ) -> Tensor:
        columns = x.shape[-1]
        if not takes_columns(columns):
            raise ValueError(f"no norm of {columns} columns")
        out = torch.empty_like(x)
        whole = (_pointer(tensor, x, x.shape) for tensor in (out, total, x, residual))
        row = (_pointer(tensor, x, (columns,)) for tensor in (weight, bias))
        threads = -(-columns // 256) * 32
        self._start(
            "norm", x, (x.numel() // columns, 1, 1), threads,
            *whole, c_float(alpha), *row, c_int(columns), c_float(eps),
        )  # fmt: skip
        return out

    def _start(
        self, name: str, x: Tensor, grid: Size, threads: int, *arguments: ctypes._SimpleCData[Any]
    ) -> None:
        self._function(name, x.dtype)(grid, (threads, 1, 1), 0, arguments)

    def _function(self, name: str, dtype: torch.dtype) -> Function:
        whole = f"{name}_{_ENDINGS.get(dtype, dtype)}"
        if whole not in self._functions:
            try:
                self._functions[whole] = self._module.function(whole)
            except KeyError as error:
                raise ValueError(f"no kernel {whole}") from error
        return self._functions[whole]


def _check_attention(row: Tensor, turns: Turns, room: Room, scratch: AttentionScratch) -> None:
    """Raise ValueError unless the kernels can take all of this together."""
    heads, count = scratch.parts.shape[:2]
    batch, groups, capacity, size = room.keys.shape
    angles = size // 2 if turns.side_by_side else size // 4
    if not takes_head(size) or batch != 1 or heads % groups or (turns.side_by_side and heads != groups):
        raise ValueError(f"{heads} heads cannot look at keys {tuple(room.keys.shape)}")
    kept = row.dtype if room.key_scale is None else torch.int8
    wanted = [
        (row, row.dtype, (*(1,) * (row.dim() - 1), (heads + 2 * groups) * size)),
        *((table, row.dtype, (len(turns.cosine), angles)) for table in (turns.cosine, turns.sine)),
        (turns.place, torch.int32, (1,)),
        *((part, kept, (1, groups, capacity, size)) for part in (room.keys, room.values)),
        *((scale, torch.float16, (1, groups, capacity)) for scale in (room.key_scale, room.value_scale)),
        (scratch.parts, torch.float32, (heads, count, 2 + size)),
        (scratch.tickets, torch.int32, (_tiles(heads, groups),)),
    ]
    for tensor, dtype, shape in wanted:
        if tensor is not None:
            _check(tensor, dtype, row.device, shape)


def _tiles(heads: int, groups: int) -> int:
    """Blocks that share out the query heads, as attention.cu does it."""
    return groups if heads == groups else groups * -(-(heads // groups) // _SHARING)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PRETENDED
    return torch.cuda.get_device_properties(device).multi_processor_count


def _pointer(tensor: Tensor | None, like: Tensor, shape: Sequence[int]) -> c_void_p:
    """The tensor's address, once its memory is known to be what a kernel will take it for."""
    if tensor is not None:
        _check(tensor, like.dtype, like.device, shape)
    return _address(tensor)


def _address(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


def _check(tensor: Tensor, dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> None:
    fits = tensor.dtype == dtype and tensor.device == device and tensor.shape == torch.Size(shape)
    if not fits or not tensor.is_contiguous() or tensor.data_ptr() % 16:  # a thread reads 16 bytes at once
        found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"wanted {dtype} {tuple(shape)} on {device}, in one piece; got {found}")
