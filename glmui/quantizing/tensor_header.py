"""What a safetensors file begins with: a header's length, then the header, JSON that places each tensor."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping

# Bytes of a value, by what the format calls its type.
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

Form = tuple[str, tuple[int, ...]]  # type and shape of one tensor


def bytes_of(form: Form) -> int:
    dtype, shape = form
    return math.prod(shape) * SIZES[dtype]


def beginning(forms: Mapping[str, Form]) -> tuple[bytes, dict[str, int]]:
    """What the file begins with, and how far behind that each tensor stands, in the file's order.

    Wide types come first: there must be no holes, and a reader needs each value at a multiple of its size.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses
    places, place = {}, 0
    for name, form in sorted(forms.items(), key=lambda item: -SIZES[item[1][0]]):
        places[name], end = place, place + bytes_of(form)
        header[name] = {"dtype": form[0], "shape": form[1], "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at whole words
    return struct.pack("<Q", len(text)) + text, places


def file_bytes(forms: Mapping[str, Form]) -> int:
    """The size of the file that holds these tensors."""
    return len(beginning(forms)[0]) + sum(map(bytes_of, forms.values()))
