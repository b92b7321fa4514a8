"""A folder that is there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glmui import workshop
from glmui.durable import flush, flush_folder
from glmui.errors import InvalidInput

_SPARE = 50_000_000  # bytes of the disk to leave free


@contextmanager
def new_folder(target: Path, need: int) -> Iterator[Path]:
    """A folder to fill with `need` bytes; once the block has ended well, its files are on the disk and it is
    called `target`. Otherwise it is removed.

    Raises InvalidInput: as check_target does, "target_no_space", "target_unwritable".
    """
    check_target(target)
    parent, need = target.parent, need + _SPARE
    try:
        with workshop.workshop(parent, _prefix(target)) as made:
            if (free := shutil.disk_usage(parent).free) < need:
                raise InvalidInput("target_no_space", folder=parent, need=_gb(need), free=_gb(free))
            yield made
            for file in made.iterdir():  # no power cut shall leave a whole name with half a content
                flush(file)
            flush_folder(made)
            if target.is_dir():
                target.rmdir()  # an empty one; Windows does not rename over it
            made.rename(target)
    except OSError as error:
        raise InvalidInput("target_unwritable", folder=target, detail=error.strerror or error) from error


def check_target(target: Path) -> None:
    """Raises InvalidInput: "target_no_parent" or "target_not_empty"."""
    if not target.parent.is_dir():
        raise InvalidInput("target_no_parent", folder=target.parent)
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise InvalidInput("target_not_empty", folder=target)


def sweep(target: Path) -> None:
    """Remove what runs that were killed left half made beside `target`."""
    workshop.sweep(target.parent, _prefix(target))


def _prefix(target: Path) -> str:
    return f".{target.name}.making-"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
