"""Where packed weights are kept, for which checkpoint, and when they go. No torch.

    <folder of packed weights>/<checkpoint's identity>/int4.packed, head8.packed …, and whose they are

Everything here may be deleted at any time: the next load makes it anew.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from glmui.errors import ModelError
from glmui.hub import manifest

SPARE = 1_000_000_000  # bytes of the disk to leave free

_OWNER = "checkpoint.json"
_WEIGHTS = (".safetensors", ".bin")
_OLD_SECONDS = 3600.0  # nobody takes so long to write one layer: what stands still so long was left behind
_log = logging.getLogger(__name__)


def identity(checkpoint: Path) -> str:
    """A name for a model folder's content that changes when its weights or its config.json do.

    The hashes of its manifest count where they are there and no weight is younger; else each file's size,
    time and number. Raises OSError.
    """
    files = sorted(file for file in checkpoint.iterdir() if file.suffix in _WEIGHTS)
    known = _hashes(checkpoint, files) or [_traits(file) for file in files]
    config = hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([known, config]).encode()).hexdigest()[:32]


def _traits(file: Path) -> list[str]:
    status = file.stat()
    return [file.name, *map(str, (status.st_size, status.st_mtime_ns, status.st_ino))]


def _hashes(checkpoint: Path, files: list[Path]) -> list[list[str]]:
    """Name and SHA-256 of each file, or nothing where the manifest cannot vouch for all of them."""
    try:
        found = manifest.read(checkpoint)
        written = (checkpoint / manifest.FILE).stat().st_mtime_ns
    except (OSError, ModelError):
        return []
    listed = found.files if found else {}
    statuses = {file.name: file.stat() for file in files}
    vouched = all(
        name in listed and status.st_size == listed[name].size and status.st_mtime_ns <= written
        for name, status in statuses.items()
    )
    return [[name, listed[name].sha256] for name in statuses] if vouched else []


def folder_for(packed_dir: Path, checkpoint: Path) -> Path:
    """Where the packed weights of a model folder are kept; made where it is not there. Raises OSError."""
    folder = packed_dir / identity(checkpoint)
    if not (folder / _OWNER).is_file():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = json.dumps({"folder": str(checkpoint.resolve())})
        (folder / _OWNER).write_text(owner, encoding="utf-8")
    return folder


def check_room(folder: Path, need: int) -> None:
    """Raises OSError unless `need` bytes leave enough of the disk free."""
    if (free := shutil.disk_usage(folder).free) < need + SPARE:
        words = f"{(need + SPARE) / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise OSError(errno.ENOSPC, words, str(folder))


def tidy(packed_dir: Path) -> None:
    """Delete what nobody will ask for again: left unfinished, or of a checkpoint that is gone or changed."""
    for folder, owner in _kept(packed_dir):
        # a young folder without an owner: another process may be about to say whose it is
        if _is_old(folder) if owner is None else _identity_or_nothing(owner) != folder.name:
            _log.info("packed weights of a model that is gone: %s deleted", folder.name)
            shutil.rmtree(folder, ignore_errors=True)
            continue
        for draft in folder.glob("*.unfinished"):
            if _is_old(draft):
                draft.unlink(missing_ok=True)


def remove_packed(packed_dir: Path, checkpoint: Path) -> None:
    """Delete what is kept for a model folder, which may be gone already. Never raises for files in use."""
    mine = {_identity_or_nothing(checkpoint)}
    for folder, owner in _kept(packed_dir):
        if folder.name in mine or owner == checkpoint.resolve():
            shutil.rmtree(folder, ignore_errors=True)


def _kept(packed_dir: Path) -> Iterator[tuple[Path, Path | None]]:
    """Each folder of packed weights, and the model folder it belongs to where that can be told."""
    for folder in [entry for entry in packed_dir.glob("*") if entry.is_dir()]:
        try:
            yield folder, Path(json.loads((folder / _OWNER).read_text(encoding="utf-8"))["folder"])
        except (OSError, ValueError, KeyError, TypeError):
            yield folder, None


def _identity_or_nothing(checkpoint: Path) -> str:
    try:
        return identity(checkpoint)
    except OSError:
        return ""


def _is_old(entry: Path) -> bool:
    try:
        return time.time() - entry.stat().st_mtime > _OLD_SECONDS
    except OSError:
        return False
