"""The built C library as a Python object: tensors in, tensors out."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Numerics = Literal["exact", "balanced", "fast"]

PANEL = 32  # output rows that lie side by side
STEP = 8  # columns a panel advances by

_NUMERICS: dict[Numerics, int] = {"exact": 0, "balanced": 1, "fast": 2}
_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "glmui_target": (ctypes.c_char_p, [_INT]),
    "glmui_open": (_POINTER, [_INT, _INT]),
    "glmui_close": (None, [_POINTER]),
    "glmui_set_threads": (_INT, [_POINTER, _INT]),
    "glmui_pack": (None, [_POINTER, _INT, _INT, _INT, _POINTER, _POINTER]),
    "glmui_linear": (_INT, [_POINTER, *[_INT] * 5, *[_POINTER] * 3, _INT, _POINTER, _POINTER]),
    "glmui_half": (None, [_POINTER, *[_INT] * 3, *[_POINTER] * 4]),
    "glmui_read": (ctypes.c_uint, [_POINTER, _POINTER, _SIZE]),
}


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantised matrix in the kernels' order (job.h tells it byte for byte), the same for every processor.

    weight: uint8, flat. scale: float32 [panels, groups, 32]. rows, columns: of the matrix itself.
    """

    weight: Tensor
    scale: Tensor
    bits: int
    rows: int
    columns: int


def packed_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of a packed weight: the published ones, filled up to 32 rows and 8 columns."""
    return -(-rows // PANEL) * PANEL * -(-columns // STEP) * bits


def fits(columns: int, groups: int, bits: int) -> bool:
    """Whether the kernels take a matrix of so many columns with so many scales a row.

    A group of columns must be made of whole blocks of at least 32 columns.
    """
    if bits not in (4, 8) or columns < 1 or columns % groups:
        return False
    width = columns // groups
    return groups == 1 or width % 32 == 0


class Library:
    """The library file, opened. Raises OSError or AttributeError when it is not what it should be."""

    def __init__(self, file: Path) -> None:
        self.calls = ctypes.CDLL(str(file))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.calls, name)
            function.restype, function.argtypes = result, arguments

    def targets(self) -> dict[str, int]:
        """Name and number of every target this processor runs, best first."""
        found: dict[str, int] = {}
        number = 0
        while (name := self.calls.glmui_target(number)) is not None:
            if name:
                found[name.decode("ascii")] = number
            number += 1
        return found


class Kernels:
    """Linear layers on the CPU for one target. Calls may come from any thread; they run one after another.

    name: the target, such as "avx512_vnni".
    """

    def __init__(self, library: Library, name: str, threads: int) -> None:
        self.name = name
        self._calls = library.calls
        self._handle = self._calls.glmui_open(library.targets()[name], threads)
        if not self._handle:
            raise MemoryError
        end = weakref.finalize(self, self._calls.glmui_close, self._handle)
        end.atexit = False  # a thread may still be computing then, and the memory goes anyway
        self.threads = threads

    @property
    def threads(self) -> int:
        """Threads that share out each layer; setting it gives as many as the system grants."""
        return self._threads

    @threads.setter
    def threads(self, count: int) -> None:
        self._threads: int = self._calls.glmui_set_threads(self._handle, count)

    def pack(self, weight: Tensor, scale: Tensor, bits: int, columns: int) -> Packed:
        """weight int8 as published, [rows, columns] or [rows, ceil(columns / 2)], and its scale
        [rows] or [rows, groups] → the kernels' order. Raises ValueError where `fits` says no."""
        rows, groups = len(weight), scale.shape[1] if scale.dim() == 2 else 1
        stored = columns if bits == 8 else -(-columns // 2)
        if not fits(columns, groups, bits) or weight.shape != (rows, stored) or len(scale) != rows:
            raise ValueError(f"cannot pack {tuple(weight.shape)} with scales {tuple(scale.shape)}")
        source = _checked(weight, torch.int8)
        packed = torch.empty(packed_bytes(rows, columns, bits), dtype=torch.uint8)
        self._calls.glmui_pack(self._handle, bits, rows, columns, source.data_ptr(), packed.data_ptr())
        filled = F.pad(scale.reshape(rows, groups).float(), (0, 0, 0, -rows % PANEL))
        panels = filled.view(-1, PANEL, groups).transpose(1, 2).contiguous()
        return Packed(packed, panels, bits, rows, columns)

    def linear(
        self, x: Tensor, w: Packed, bias: Tensor | None = None, numerics: Numerics = "exact"
    ) -> Tensor:
        """x float32 [..., columns] → float32 [..., rows].

        exact: float32 activations. balanced: 16-bit ones, one scale for each 256 columns. fast: 8-bit.
        Raises ValueError for other shapes, dtypes or devices, MemoryError.
        """
        if w.weight.numel() != packed_bytes(w.rows, w.columns, w.bits):
            raise ValueError("the packed weight is not whole")
        flat, bias, y = self._arguments(x, w.columns, w.rows, bias)
        weight, scale = _checked(w.weight, torch.uint8), _checked(w.scale, torch.float32)
        failed = self._calls.glmui_linear(
            self._handle, w.bits, _NUMERICS[numerics], len(flat), w.columns, w.rows, flat.data_ptr(),
            weight.data_ptr(), scale.data_ptr(), scale.shape[1], _pointer(bias), y.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError
        return y.view(*x.shape[:-1], w.rows)

    def half(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x float32 [..., columns] times weight float16 [rows, columns], summed in float32 → [..., rows]."""
        rows, columns = weight.shape
        flat, bias, y = self._arguments(x, columns, rows, bias)
        pointers = flat.data_ptr(), _checked(weight, torch.float16).data_ptr(), _pointer(bias), y.data_ptr()
        self._calls.glmui_half(self._handle, len(flat), columns, rows, *pointers)
        return y.view(*x.shape[:-1], rows)

    def read(self, memory: Tensor) -> int:
        """Read every byte of `memory` (whole pages of 4096) once: what decoding cannot go faster than."""
        checked = _checked(memory, memory.dtype)
        total: int = self._calls.glmui_read(self._handle, checked.data_ptr(), checked.nbytes)
        return total

    def _arguments(
        self, x: Tensor, columns: int, rows: int, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """x as contiguous rows, the bias as float32, and room for the result."""
        if x.shape[-1] != columns:
            raise ValueError(f"{x.shape[-1]} columns meet a weight of {columns}")
        flat = _checked(x.reshape(-1, columns).contiguous(), torch.float32)
        if bias is not None:
            bias = _checked(bias.float().contiguous(), torch.float32)
            if bias.shape != (rows,):
                raise ValueError(f"a bias of {tuple(bias.shape)} for {rows} rows")
        return flat, bias, torch.empty(len(flat), rows)


def _checked(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, once its memory is known to be what C will take it for."""
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"wanted {dtype} on the CPU, in one piece; got {tensor.dtype} on {tensor.device}")
    return tensor


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
