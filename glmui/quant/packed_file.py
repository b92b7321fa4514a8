"""A model's packed layers in one file, mapped instead of read: what was packed once need not be packed again.

The file is the tensors, each on a page of its own, then a table of them as JSON, then the table's length
and check sum and a mark. It appears under its name only once it is whole and on the disk. Every byte is
summed up again when it is opened, at the speed of memory, so that a file which a disk or a crash has
changed is never computed with.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from glmui.quant.kernels.cpu.native import PANEL, Packed, packed_bytes

PAGE = 4096
_SYNC = 1 << 28  # bytes: fsync every 256 MiB, so that the last one is short on a slow disk
_MARK = b"glmui-packed-1\n\0"
_END = struct.Struct(f"<QI{len(_MARK)}s")  # length of the table, its check sum, the mark


class NotUsable(Exception):
    """No file, a damaged one, or one made of something else."""


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A linear layer: its packed weight, and its bias float32 [rows] or None."""

    packed: Packed
    bias: Tensor | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {"weight": self.packed.weight, "scale": self.packed.scale}
        return named if self.bias is None else {**named, "bias": self.bias}


def room_for(rows: int, columns: int, bits: int, groups: int = 1) -> int:
    """Bytes that a layer takes in a file at most, its bias and its entry in the table included."""
    return packed_bytes(rows, columns, bits) + 4 * PANEL * -(-rows // PANEL) * (groups + 1) + 4 * PAGE


def write(file: Path, made_of: str, layers: Iterable[tuple[str, PackedLayer]]) -> None:
    """Put named layers into `file`, one at a time, so that they may be made one at a time.

    made_of: must be said again to read it. Two processes may write the same file; the last one stays.
    Raises OSError; an earlier file of that name is then still there.
    """
    handle, draft = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.", suffix=".unfinished")
    try:
        with open(handle, "wb") as out:
            _write(out, made_of, layers)
            _sync(out)
        Path(draft).replace(file)
    finally:
        Path(draft).unlink(missing_ok=True)


def _write(out: IO[bytes], made_of: str, layers: Iterable[tuple[str, PackedLayer]]) -> None:
    table: dict[str, Any] = {}
    synced = 0
    for name, layer in layers:
        if out.tell() > synced + _SYNC:
            _sync(out)
            synced = out.tell()
        w = layer.packed
        table[name] = {"bits": w.bits, "rows": w.rows, "columns": w.columns, "groups": w.scale.shape[1]}
        table[name] |= {part: _append(out, tensor) for part, tensor in layer.tensors.items()}
    text = json.dumps({"made_of": made_of, "layers": table}).encode()
    out.write(text + _END.pack(len(text), zlib.crc32(text), _MARK))


def _sync(out: IO[bytes]) -> None:
    out.flush()
    os.fsync(out.fileno())


def _append(out: IO[bytes], tensor: Tensor) -> tuple[int, int, int]:
    """Write a tensor from the next page on: where it begins, its length and its check sum."""
    values = _bytes(tensor.detach().contiguous().view(-1).view(torch.uint8))
    out.write(bytes(-out.tell() % PAGE))
    begin = out.tell()
    out.write(values)
    return begin, values.nbytes, zlib.crc32(values)


def read(
    file: Path,
    made_of: str,
    threads: int = 1,
    on_progress: Callable[[float], None] = lambda part: None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, PackedLayer]:
    """The wanted layers of a file, mapped: their memory is the file's pages, shared by all who read it.

    on_progress: the part of them that has been summed up, 0..1. wanted: told a name. Raises NotUsable.
    """
    try:
        everything, size = _table(file, made_of)
        table = {name: entry for name, entry in everything.items() if wanted(name)}
        whole = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
        places = [place for entry in table.values() for place in entry.values() if isinstance(place, list)]
        _check_sums(whole, places, threads, on_progress)
        return {name: _layer(whole, entry) for name, entry in table.items()}
    except NotUsable:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise NotUsable(f"{type(error).__name__}: {error}") from error


def _table(file: Path, made_of: str) -> tuple[Mapping[str, Any], int]:
    """The table of layers, and the file's size."""
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - _END.size))
        length, total, mark = _END.unpack(opened.read())
        if mark != _MARK or length > size - _END.size:
            raise NotUsable("not whole")
        opened.seek(size - _END.size - length)
        text = opened.read(length)
    if zlib.crc32(text) != total:
        raise NotUsable("damaged")
    found = json.loads(text)
    if found["made_of"] != made_of:
        raise NotUsable("made of something else")
    return found["layers"], size


def _check_sums(
    whole: Tensor, places: list[list[int]], threads: int, on_progress: Callable[[float], None]
) -> None:
    """Raises NotUsable where a byte differs from what was written. Brings the pages into memory, too."""

    def is_right(place: list[int]) -> bool:
        begin, length, total = place
        part = _bytes(whole[begin : begin + length])
        return len(part) == length and zlib.crc32(part) == total  # lets other threads run meanwhile

    done, everything = 0, sum(length for _, length, _ in places)
    with ThreadPoolExecutor(threads) as pool:
        for (_, length, _), right in zip(places, pool.map(is_right, places), strict=True):
            if not right:
                pool.shutdown(cancel_futures=True)
                raise NotUsable("damaged")
            done += length
            on_progress(done / everything)


def _layer(whole: Tensor, entry: Mapping[str, Any]) -> PackedLayer:
    rows, columns, bits = entry["rows"], entry["columns"], entry["bits"]
    weight = _part(whole, entry["weight"])
    scale = _part(whole, entry["scale"]).view(torch.float32).view(-1, entry["groups"], PANEL)
    bias = _part(whole, entry["bias"]).view(torch.float32) if "bias" in entry else None
    if weight.numel() != packed_bytes(rows, columns, bits) or len(scale) != -(-rows // PANEL):
        raise NotUsable("sizes disagree")
    return PackedLayer(Packed(weight, scale, bits, rows, columns), bias)


def _part(whole: Tensor, place: list[int]) -> Tensor:
    begin, length, _ = place
    return whole[begin : begin + length]


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor of bytes as what zlib and files take, nothing copied."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers since 3.12's types
