"""The kernels for quantised matrices (linear.cu) as a Python object: tensors on a card in, tensors out."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from glmui.quant.kernels.cuda.driver import Function, Module, Size

MOST_ROWS = 8  # of x in one call

_ENDINGS = {torch.float16: "half", torch.bfloat16: "bf16"}  # of the kernels' names
_KINDS = (1, 2, 4, 8)  # rows of x that a kernel is made for; it takes fewer, too
_ALIGNED = 16  # bytes: where tensors must begin for the fast kernels, as all do that torch makes
_LANES, _WARPS = 32, 8  # of a block: its warps either share a row of the matrix or have rows of their own
_STAGE = 32 << 10  # bytes of x that a block keeps in shared memory; two blocks fit on the smallest card
_BUSY = 2048  # warps from which on the largest card is busy with rows alone


@dataclass(frozen=True, slots=True)
class Shape:
    """A quantised matrix. groups: scales of a row."""

    bits: int
    rows: int
    columns: int
    groups: int

    def is_made_of(self, columns: int) -> bool:
        """Whether each group of columns is a multiple of so many."""
        return self.columns // self.groups % columns == 0


class CardKernels:
    """Linear layers with quantised weights on one card, all sums in float32, on torch's current stream.

    A matrix is as packing.py stores it: weight int8 [out, in] for 8 bits or [out, ceil(in / 2)] for 4;
    scale [out] or [out, groups], always float16. Any shape is right; the fast ones have rows (or groups of
    columns) of a multiple of 32 columns for 4 bits, of 16 for 8. Tensors lie on the card, each in one piece.

    name: the card's architecture, such as "sm_86".
    """

    def __init__(self, module: Module, name: str) -> None:
        self.name = name
        self._module = module
        self._functions: dict[str, Function] = {}
        self._taken: dict[torch.dtype, bool] = {}

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether there are kernels that compute with such numbers: before 8.0 none do with bfloat16."""
        if dtype not in self._taken:
            try:
                self._taken[dtype] = bool(self._function("widen_any", dtype))
            except KeyError:
                self._taken[dtype] = False
        return self._taken[dtype]

    def linear(
        self, x: Tensor, weight: Tensor, scale: Tensor, bits: int, bias: Tensor | None = None
    ) -> Tensor:
        """x [..., in] float16 or bfloat16 with at most MOST_ROWS rows → [..., out] in x's dtype.

        bias: [out] in x's dtype. Raises ValueError for other shapes, dtypes or devices, KeyError where the
        module has no such kernel.
        """
        shape = _shape(weight, scale, bits, x.shape[-1], x.device)
        flat = _checked(x.reshape(-1, shape.columns).contiguous(), _float(x), x.device)
        if bias is not None and _checked(bias, x.dtype, x.device).shape != (shape.rows,):
            raise ValueError(f"a bias of {tuple(bias.shape)} for {shape.rows} rows")
        if len(flat) > MOST_ROWS:
            raise ValueError(f"{len(flat)} rows of x; at most {MOST_ROWS}")
        y = x.new_empty(*x.shape[:-1], shape.rows)
        if y.numel():
            piece = _ALIGNED * 8 // bits
            launch = self._linear if shape.is_made_of(piece) and _aligned(flat, weight) else self._linear_any
            launch(shape, flat, weight, scale, bias, y)
        return y

    def _linear(
        self, shape: Shape, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor
    ) -> None:
        kind = next(kind for kind in _KINDS if kind >= len(x))
        launch = Launch.of(shape, kind)
        self._start(
            f"linear_{shape.bits}_{kind}", x, launch.grid, launch.block, launch.shared,
            x, weight, scale, bias, y, len(x), shape.columns, shape.rows, shape.groups, launch.chunk,
        )  # fmt: skip

    def _linear_any(
        self, shape: Shape, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor
    ) -> None:
        grid, block = (ceil(shape.rows / _WARPS), 1, 1), (_LANES, _WARPS, 1)
        self._start(
            "linear_any", x, grid, block, 0,
            x, weight, scale, bias, y, len(x), shape.columns, shape.rows, shape.groups, shape.bits,
        )  # fmt: skip

    def widen(self, weight: Tensor, scale: Tensor, bits: int, out: Tensor) -> None:
        """The matrix that weight and scale stand for, rounded once, into `out` [out, in] float16 or bfloat16.

        Raises like `linear`.
        """
        _checked(out, _float(out), out.device)
        shape = _shape(weight, scale, bits, out.shape[-1], out.device)
        if out.shape != (shape.rows, shape.columns):
            raise ValueError(f"{shape.rows} rows do not fit {tuple(out.shape)}")
        if not out.numel():
            return
        fast = shape.is_made_of(8) and _aligned(weight, out)
        name, last = (f"widen_{bits}", []) if fast else ("widen_any", [bits])
        threads = _LANES * _WARPS
        grid = (shape.rows, ceil(shape.columns / (8 if fast else 1) / threads), 1)
        self._start(
            name, out, grid, (threads, 1, 1), 0, weight, scale, out, shape.columns, shape.groups, *last
        )

    def _start(
        self, name: str, like: Tensor, grid: Size, block: Size, shared: int, *arguments: Tensor | int | None
    ) -> None:
        """Start a kernel in the form for the dtype of `like`."""
        self._function(name, like.dtype)(grid, block, shared, [_argument(each) for each in arguments])

    def _function(self, name: str, dtype: torch.dtype) -> Function:
        name = f"{name}_{_ENDINGS[dtype]}"
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self._module.function(name)
        return function


@dataclass(frozen=True, slots=True)
class Launch:
    """How a matrix is shared out to a card's blocks. chunk: pieces of x in shared memory; see linear.cu."""

    grid: Size
    block: Size
    shared: int
    chunk: int

    @classmethod
    def of(cls, shape: Shape, kind: int) -> Launch:
        """For the kernel that takes `kind` rows of x."""
        rows = 4 if kind == 1 else 2  # of a warp: Products::ROWS
        columns = _ALIGNED * 8 // shape.bits  # of a piece
        steps = ceil(shape.columns / columns / _LANES)  # of a warp that has a row to itself
        room = _STAGE // (2 * kind * columns * _LANES)  # steps that fit into shared memory
        chunk = min(steps, room)
        most = min(_WARPS, steps if steps <= room else room // 2)  # a warp takes two steps of a chunk in turn
        along = 1  # warps that share a row: more where there are few rows
        while 2 * along <= most and ceil(shape.rows / rows) * along < _BUSY:
            along *= 2
        across = _WARPS // along
        shared = 2 * kind * columns * _LANES * chunk  # in which the sums of all warps find room, too
        grid = ceil(shape.rows / (rows * across))
        return cls((grid, 1, 1), (_LANES, along, across), shared, chunk * _LANES)


def _shape(weight: Tensor, scale: Tensor, bits: int, columns: int, device: torch.device) -> Shape:
    """Raises ValueError unless this is a quantised matrix of so many columns on the device."""
    _checked(weight, torch.int8, device)
    _checked(scale, torch.float16, device)
    groups = scale.shape[1] if scale.dim() == 2 else 1
    stored = columns if bits == 8 else ceil(columns / 2)
    if bits not in (4, 8) or weight.shape != (len(weight), stored) or scale.dim() not in (1, 2):
        raise ValueError(f"{columns} columns meet a weight of {tuple(weight.shape)} in {bits} bits")
    if len(scale) != len(weight) or not groups or not columns or columns % groups:
        raise ValueError(f"scales of {tuple(scale.shape)} for {tuple(weight.shape)}")
    return Shape(bits, len(weight), columns, groups)


def _checked(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor, once its memory is known to be what a kernel will take it for."""
    if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous() or not tensor.dim():
        raise ValueError(f"wanted {dtype} on {device}, in one piece; got {tensor.dtype} on {tensor.device}")
    return tensor


def _float(x: Tensor) -> torch.dtype:
    """x's dtype. Raises ValueError where there are no kernels for it."""
    if x.dtype not in _ENDINGS:
        raise ValueError(f"no kernels for {x.dtype}")
    return x.dtype


def _aligned(*tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % _ALIGNED == 0 for tensor in tensors)


def _argument(value: Tensor | int | None) -> ctypes.c_void_p | ctypes.c_uint:
    if isinstance(value, int):
        return ctypes.c_uint(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())
