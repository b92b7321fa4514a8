"""A safetensors file written tensor by tensor, so that it may be larger than the memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from glmui.quantizing.tensor_header import Form, beginning

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


def form_of(tensor: Tensor) -> Form:
    return _NAMES[tensor.dtype], tuple(tensor.shape)


class TensorFile:
    """Open for writing: `forms` tells every tensor beforehand, write() takes each once, in any order."""

    def __init__(self, file: Path, forms: Mapping[str, Form]) -> None:
        self._missing = dict(forms)
        first, places = beginning(forms)
        self._places = {name: len(first) + place for name, place in places.items()}
        self._opened = file.open("wb")
        self._opened.write(first)

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for a tensor that was told otherwise, OSError."""
        told = self._missing.pop(name, None)
        if told != (form := form_of(tensor)):
            raise ValueError(f"{name} is {form}, but was told as {told}")
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
