"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from glmui.durable import flush_folder
from glmui.errors import InvalidInput

_SPARE = 50_000_000  # bytes of the disk to leave free


@contextmanager
def new_folder(target: Path, need: int) -> Iterator[Path]:
    """A folder to fill with `need` bytes; once the block has ended well, its files are on the disk and it is
    called `target`. Otherwise it is removed.

    Raises InvalidInput: as check_target does, "target_no_space", "target_unwritable".
    """
    check_target(target)
    sweep(target)
    free = shutil.disk_usage(target.parent).free
    if free < need + _SPARE:
        raise InvalidInput("target_no_space", folder=target.parent, need=_gb(need + _SPARE), free=_gb(free))
    made: Path | None = None
    try:
        made = Path(tempfile.mkdtemp(prefix=_prefix(target, os.getpid()), dir=target.parent))
        yield made
        _flush(made)
        if target.is_dir():
            target.rmdir()  # an empty one; Windows does not rename over it
        made.rename(target)
        made = None
    except OSError as error:
        raise InvalidInput("target_unwritable", folder=target, detail=error.strerror or error) from error
    finally:
        if made:
            shutil.rmtree(made, ignore_errors=True)


def check_target(target: Path) -> None:
    """Raises InvalidInput: "target_no_parent" or "target_not_empty"."""
    if not target.parent.is_dir():
        raise InvalidInput("target_no_parent", folder=target.parent)
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise InvalidInput("target_not_empty", folder=target)


def sweep(target: Path) -> None:
    """Remove what runs that were killed left half made beside `target`."""
    beginning = _prefix(target, None)
    for old in target.parent.glob(f"{_escaped(beginning)}*"):
        pid = old.name.removeprefix(beginning).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)


def _prefix(target: Path, pid: int | None) -> str:
    return f".{target.name}.making-{'' if pid is None else f'{pid}-'}"


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _flush(folder: Path) -> None:
    """Put the folder's files on the disk, so that no power cut leaves a whole name with half a content."""
    for file in folder.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    flush_folder(folder)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
