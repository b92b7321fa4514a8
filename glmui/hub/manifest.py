"""glmui.json: what a model folder was made of, and the hash of every file in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from glmui.durable import flush
from glmui.errors import ModelError
from glmui.text.model_files import read_json

FILE = "glmui.json"
_CHUNK = 1 << 22
_STRANGE: tuple[type[Exception], ...] = (TypeError, KeyError, ValueError, AttributeError)


@dataclass(frozen=True, slots=True)
class Stored:
    """One file: its size in bytes and its sha256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What stands in glmui.json.

    source: where the model came from, in words (a repository, a package, a folder's name).
    made_from: the weight files it was made of. files: everything the folder holds, but this file.
    licence: its name, "" when unknown. date: ISO 8601, UTC. quantize: what the import made of the weights.
    """

    name: str
    source: str
    licence: str = ""
    date: str = ""
    quantize: str = "none"
    files: Mapping[str, Stored] = field(default_factory=dict)
    made_from: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(stored.size for stored in self.files.values())


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(folder: Path) -> Manifest | None:
    """The folder's manifest, or None where it has none. Raises ModelError("model_file_broken")."""
    values = read_json(folder / FILE)
    if not values:
        return None
    try:
        return Manifest(**{**values, **{key: _files(values.get(key, {})) for key in ("files", "made_from")}})
    except _STRANGE as error:
        raise ModelError("model_file_broken", folder=folder, file=FILE) from error


def _files(values: dict[str, dict[str, Any]]) -> dict[str, Stored]:
    found = {path: Stored(int(stored["size"]), str(stored["sha256"])) for path, stored in values.items()}
    if not all(Path(path).name == path for path in found):
        raise ValueError(found)
    return found


def write(folder: Path, manifest: Manifest) -> None:
    """Put the manifest into the folder, flushed to the disk."""
    text = json.dumps(asdict(manifest), ensure_ascii=False, indent=2) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")
    flush(folder / FILE)


def chunks(file: Path) -> Iterator[bytes]:
    """The file, piece by piece."""
    with file.open("rb") as opened:
        while piece := opened.read(_CHUNK):
            yield piece


def stored(file: Path, on_bytes: Callable[[int], None] = lambda count: None) -> Stored:
    """The file's size and sha256 as it lies there. on_bytes: told of every piece that was read."""
    digest, size = hashlib.sha256(), 0
    for piece in chunks(file):
        digest.update(piece)
        size += len(piece)
        on_bytes(len(piece))
    return Stored(size, digest.hexdigest())


def stored_in(folder: Path) -> dict[str, Stored]:
    """Every file of the folder but the manifest."""
    return {file.name: stored(file) for file in sorted(folder.iterdir()) if file.name != FILE}
