"""Whether a weight file has the form it should have, read without torch: before anything interprets it.

A published .bin is a ZIP of uncompressed entries: one short pickle that says how the tensors lie, and their
bytes. The pickle may name a handful of things; whatever else it names would be a program's doing.
"""

from __future__ import annotations

import json
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

from glmui.errors import ModelError
from glmui.glm.files import look_at
from glmui.text.model_files import refusal

_LONGEST_HEADER = 4 << 20  # bytes; GLM-4's is 30 KB
_LONGEST_PICKLE = 1 << 20  # ChatGLM-6B's is 50 KB
_LONGEST_DIRECTORY = 4 << 20  # of a ZIP, about 60,000 entries

_ENTRY = re.compile(
    r"[^/\\]+/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d{1,9})"
)
_STORAGES = ("Half", "BFloat16", "Float", "Double", "Char", "Byte", "Short", "Int", "Long", "Bool")
_NAMED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}
# Ways to name or build something that a pickle of this kind never uses.
_STRANGE = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}

_ARCHIVES = {b"\x1f\x8b": 0, b"7z\xbc\xaf": 0, b"Rar!": 0, b"BZh": 0, b"\xfd7zXZ": 0, b"ustar": 257}


def check_beginning(file: Path) -> None:
    """Raises ModelError for what is often found in the place of weights."""
    with file.open("rb") as opened:
        start = opened.read(512)
    if any(start.startswith(mark, place) for mark, place in _ARCHIVES.items()):
        raise refusal("model_file_archive", file)
    if start.lstrip().startswith((b'{"', b'[{"')) and file.stat().st_size < 100_000:
        raise refusal("model_file_answer", file)


def check_weight_file(file: Path) -> None:
    """Raises ModelError saying what the file is instead of weights."""
    look_at(file)
    if file.suffix == ".safetensors":
        _check_header(file)
    else:
        _check_bin(file)


def _check_header(file: Path) -> None:
    """Eight bytes of length, then JSON: every tensor's place. That they fit is safetensors' own check."""
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= file.stat().st_size - 8:
            raise refusal("model_file_cut", file)
        if length > _LONGEST_HEADER:
            raise refusal("model_file_strange", file)
        text = opened.read(length)
    try:
        json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise refusal("model_file_strange", file) from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _check_bin(file: Path) -> None:
    if _directory_bytes(file) > _LONGEST_DIRECTORY:
        raise refusal("model_file_strange", file)
    try:
        with zipfile.ZipFile(file) as box:
            text = _pickle_of(box, file)
        _check_pickle(text, file)
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, RuntimeError) as error:
        raise refusal("model_file_cut", file) from error


def _directory_bytes(file: Path) -> int:
    """How long the ZIP's table of contents says it is. Asked first: reading a huge one takes long."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - (1 << 16) - 98))
        tail = opened.read()
    place, far = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    size = struct.unpack_from("<I", tail, place + 12)[0] if 0 <= place <= len(tail) - 16 else 0
    if size == 0xFFFFFFFF and 0 <= far <= len(tail) - 48:
        size = struct.unpack_from("<Q", tail, far + 40)[0]
    return int(size)


def _pickle_of(box: zipfile.ZipFile, file: Path) -> bytes:
    """The pickle, once the entries are those of a torch file: plain, uncompressed, and each there once."""
    entries = box.infolist()
    names = [entry.orig_filename for entry in entries]
    roots = {name.partition("/")[0] for name in names}
    as_they_should = (
        len(set(names)) == len(names)
        and len(roots) == 1
        and roots.isdisjoint({"", ".", ".."})
        and all(_ENTRY.fullmatch(name) for name in names)
        and all(e.compress_type == zipfile.ZIP_STORED and not e.flag_bits & 1 for e in entries)
        and sum(entry.file_size for entry in entries) <= file.stat().st_size
    )
    pickles = [e for e in entries if e.orig_filename.endswith("/data.pkl")]
    if not as_they_should or len(pickles) != 1 or pickles[0].file_size > _LONGEST_PICKLE:
        raise refusal("model_file_strange", file)
    return box.read(pickles[0])


def _check_pickle(text: bytes, file: Path) -> None:
    """Read a pickle's operations without carrying out any."""
    try:
        for operation, argument, _ in pickletools.genops(text):
            if operation.name == "GLOBAL" and argument not in _NAMED:
                raise ModelError(
                    "model_file_program", folder=file.parent, file=file.name, name=_shown(str(argument))
                )
            if operation.name in _STRANGE:
                raise refusal("model_file_refused", file)
    except (ValueError, IndexError, struct.error, RecursionError, OverflowError) as error:
        raise refusal("model_file_cut", file) from error


def _shown(name: str) -> str:
    """A name out of a stranger's file, fit for a sentence: "os system" becomes "os.system"."""
    plain = re.sub(r"[^\w. ]", "?", name)[:80]
    return plain.replace(" ", ".")
