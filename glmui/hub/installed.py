"""The models of this computer: by name in the data folder, or anywhere by path."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from glmui.engine.families import family_of
from glmui.engine.model_folder import ECHO, Family
from glmui.errors import ModelError, NotFound

STARTER = "starter"


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model in the data folder. label: a key of the locales' "models", or ""."""

    name: str
    folder: Path
    family: Family
    label: str


def models_folder(data_dir: Path) -> Path:
    return data_dir / "models"


def resolve(name: str, data_dir: Path) -> Path:
    """The folder of a model: a name in the data folder, or a path. Looks no further than whether it is there.

    Raises NotFound: "starter_missing" or "model_missing".
    """
    if name == ECHO:
        return Path(ECHO)
    plain = name and name == Path(name).name and not name.startswith(".")
    if plain and (inside := models_folder(data_dir) / name).is_dir():
        return inside
    path = Path(os.path.expanduser(name))
    with contextlib.suppress(OSError, ValueError):  # a name too long, a folder not to be looked into
        if name and path.is_dir():
            return path.resolve()
    if name == STARTER:
        raise NotFound("starter_missing")
    raise NotFound("model_missing", model=name, folder=models_folder(data_dir))


def models(data_dir: Path) -> list[InstalledModel]:
    """Every whole model of the data folder, by name; damaged and half-made ones are left out."""
    folder = models_folder(data_dir)
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and not path.name.startswith("."):
            with contextlib.suppress(ModelError):
                found.append(_entry(path))
    return found


def _entry(path: Path) -> InstalledModel:
    label = "models.starter" if path.name == STARTER else ""
    return InstalledModel(path.name, path, family_of(path), label)
