"""A safetensors file written tensor by tensor, so that it may be larger than the memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Form = tuple[torch.dtype, tuple[int, ...]]  # of one tensor


def bytes_of(form: Form) -> int:
    dtype, shape = form
    return math.prod(shape) * dtype.itemsize


def file_bytes(forms: Mapping[str, Form]) -> int:
    """The size of the file that holds these tensors."""
    return len(_beginning(forms)[0]) + sum(map(bytes_of, forms.values()))


def _beginning(forms: Mapping[str, Form]) -> tuple[bytes, dict[str, int]]:
    """What the file begins with, and how far behind that each tensor stands.

    Wide types come first: there must be no holes, and a reader needs each value at a multiple of its size.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses
    places, place = {}, 0
    for name, form in sorted(forms.items(), key=lambda item: -item[1][0].itemsize):
        places[name], end = place, place + bytes_of(form)
        header[name] = {"dtype": _NAMES[form[0]], "shape": form[1], "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at whole words
    return struct.pack("<Q", len(text)) + text, places


class TensorFile:
    """Open for writing: `forms` tells every tensor beforehand, write() takes each once, in any order."""

    def __init__(self, file: Path, forms: Mapping[str, Form]) -> None:
        self._missing = dict(forms)
        beginning, places = _beginning(forms)
        self._places = {name: len(beginning) + place for name, place in places.items()}
        self._opened = file.open("wb")
        self._opened.write(beginning)

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for a tensor that was told otherwise, OSError."""
        form = self._missing.pop(name, None)
        if form != (tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but was told as {form}")
        self._opened.seek(self._places[name])
        self._opened.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()
        if kind is None and self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written")
