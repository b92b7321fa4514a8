"""Models that were removed: kept for a week, so that a removal can be undone."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from glmui.engine.packed import remove_packed
from glmui.errors import InvalidInput, NotFound, StoreError
from glmui.hub import installed
from glmui.hub.installed import models_folder
from glmui.settings import PACKED

TRASH = ".trash"  # inside the models' folder: moving there is one rename
KEPT_SECONDS = 7 * 86400


@dataclass(frozen=True, slots=True)
class Removed:
    """A model in the trash. when: seconds since 1970; size: bytes."""

    name: str
    folder: Path
    when: float
    size: int


def remove(name: str, data_dir: Path, now: bool = False) -> None:
    """Move a model to the trash, from where `restore` brings it back for seven days; now: delete it at once.

    The engine must not have it loaded. Raises NotFound("model_missing"), or StoreError("model_in_use") where
    the system does not let go of an open file (Windows).
    """
    folder = installed.inside(name, data_dir)
    remove_packed(data_dir / PACKED, folder)
    trash = models_folder(data_dir) / TRASH
    trashed = trash / f"{time.time_ns()}-{name}"
    try:
        trash.mkdir(mode=0o700, exist_ok=True)
        folder.rename(trashed)
    except OSError as error:
        raise StoreError("model_in_use", model=name, detail=error.strerror or error) from error
    if now:
        shutil.rmtree(trashed, ignore_errors=True)


def restore(name: str, data_dir: Path) -> Path:
    """Bring back the model of that name that was removed last.

    Raises NotFound("model_not_removed"), or InvalidInput("model_name_taken").
    """
    found = next((entry for entry in removed(data_dir) if entry.name == name), None)
    if found is None:
        raise NotFound("model_not_removed", model=name)
    folder = models_folder(data_dir) / name
    if folder.exists():
        raise InvalidInput("model_name_taken", name=name)
    found.folder.rename(folder)
    return folder


def removed(data_dir: Path) -> list[Removed]:
    """What lies in the trash, newest first; what has lain there for seven days is deleted."""
    trash = models_folder(data_dir) / TRASH
    found = []
    for folder in trash.iterdir() if trash.is_dir() else ():
        when, _, name = folder.name.partition("-")
        if not when.isdecimal() or not name:
            continue
        seconds = int(when) / 1e9
        if time.time() - seconds > KEPT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            found.append(Removed(name, folder, seconds, installed.folder_size(folder)))
    return sorted(found, key=lambda entry: -entry.when)
