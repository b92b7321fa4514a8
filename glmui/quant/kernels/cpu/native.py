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
_KEPT = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # dtypes of a KV cache
_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "glmui_target": (ctypes.c_char_p, [_INT]),
    "glmui_open": (_POINTER, [_INT, _INT]),
    "glmui_close": (None, [_POINTER]),
    "glmui_set_threads": (_INT, [_POINTER, _INT]),
    "glmui_pack": (None, [_POINTER, _INT, _INT, _INT, _POINTER, _POINTER]),
    "glmui_linear": (_INT, [_POINTER, *[_INT] * 5, *[_POINTER] * 3, _INT, _POINTER, _POINTER]),
    "glmui_half": (None, [_POINTER, *[_INT] * 3, *[_POINTER] * 4]),
    "glmui_attend": (
        _INT,
        [_POINTER, *[_INT] * 7, *[_POINTER] * 3, _SIZE, _SIZE, _POINTER, ctypes.c_float, _POINTER],
    ),
    "glmui_gelu": (None, [_POINTER, _POINTER, _SIZE]),
    "glmui_rotate": (
        None,
        [_POINTER, _POINTER, _INT, _SIZE, _INT, _SIZE, _INT, _INT, _POINTER, _POINTER],
    ),
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
    """Linear layers, and what stands between them, on the CPU for one target.

    Calls may come from any thread; they run one after another.

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

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> Tensor:
        """softmax(q kᵀ / √d) v, summed in float32. queries float32 [b, n, h, d] → [b, n, h, d].

        keys, values: [b, g, t, d] float32, float16 or bfloat16, each head's tokens in one piece; g divides h
        and 16 divides d. visible: [b, 1, n, t] bool, at least one token for each row; None: all.
        Raises ValueError for other shapes, dtypes or devices, MemoryError.
        """
        batch, rows, heads, size = queries.shape
        groups, length = keys.shape[1:3]
        if keys.shape != (batch, groups, length, size) or heads % groups or size % 16 or not length:
            raise ValueError(f"queries {tuple(queries.shape)} cannot look at keys {tuple(keys.shape)}")
        if not _lie_alike(keys, values):
            raise ValueError(f"cannot read keys {keys.stride()} and values {values.stride()}")
        if visible is not None:
            visible = _checked(visible[:, 0].expand(batch, rows, length).contiguous(), torch.bool)
        q = _checked(queries.contiguous(), torch.float32)
        out = torch.empty_like(q)
        failed = self._calls.glmui_attend(
            self._handle, _KEPT[keys.dtype], batch, rows, groups, heads // groups, size, length,
            q.data_ptr(), keys.data_ptr(), values.data_ptr(), *keys.stride()[:2], _pointer(visible),
            size**-0.5, out.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError
        return out

    def gelu(self, x: Tensor) -> Tensor:
        """x float32 through GELU (tanh form), in place."""
        self._calls.glmui_gelu(self._handle, _checked(x, torch.float32).data_ptr(), x.numel())
        return x

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x float32 [b, n, h, d] turned by its positions' angles, in place. See glm/rotary.py.

        cosine, sine: float32 [b, n, 1, parts, d / (2 parts)]. x may be a part of a tensor, each head and the
        rows of all batches evenly apart. Raises ValueError for anything else.
        """
        batch, rows, heads, size = x.shape
        parts, pairs = cosine.shape[-2:]
        if cosine.shape != (batch, rows, 1, parts, pairs) or size != 2 * parts * pairs:
            raise ValueError(f"cannot turn {tuple(x.shape)} by {tuple(cosine.shape)}")
        step = x.stride(1) if rows > 1 else x.stride(0)
        even = x.stride(3) == 1 and (1 in (batch, rows) or x.stride(0) == rows * step)
        if x.dtype != torch.float32 or x.device.type != "cpu" or not even:
            raise ValueError(f"cannot turn {x.dtype} with strides {x.stride()}")
        cosine, sine = (_checked(turn.contiguous(), torch.float32) for turn in (cosine, sine))
        self._calls.glmui_rotate(
            self._handle, x.data_ptr(), batch * rows, step, heads, x.stride(2), parts, pairs,
            cosine.data_ptr(), sine.data_ptr(),
        )  # fmt: skip
        return x

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


def _lie_alike(keys: Tensor, values: Tensor) -> bool:
    """Whether C can read both: on the CPU, in one dtype and order, each head's tokens behind one another."""
    return (
        keys.dtype == values.dtype
        and keys.dtype in _KEPT
        and keys.device.type == values.device.type == "cpu"
        and keys.shape == values.shape
        and keys.stride() == values.stride()
        and keys.stride()[2:] == (keys.shape[3], 1)
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
