"""The models of this computer: by name in the data folder, or anywhere by path."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from glmui.engine.families import family_of
from glmui.engine.model_folder import ECHO, Family
from glmui.errors import ModelError, NotFound
from glmui.hub import manifest

STARTER = "starter"


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model in the data folder.

    label: a key of the locales' "models", or "". size: bytes on the disk. licence, date, quantize: as its
    manifest tells, "" where it has none. problem: why it cannot be opened, or None.
    """

    name: str
    folder: Path
    family: Family | None
    label: str
    size: int = 0
    licence: str = ""
    date: str = ""
    quantize: str = ""
    problem: ModelError | None = None


def models_folder(data_dir: Path) -> Path:
    return data_dir / "models"


def resolve(name: str, data_dir: Path) -> Path:
    """The folder of a model: a name in the data folder, or a path. Looks no further than whether it is there.
    "echo" may have words behind it, which the scripted engine reads.

    Raises NotFound: "starter_missing" or "model_missing".
    """
    if name.split(" ")[0] == ECHO:
        return Path(ECHO)
    if is_plain(name) and (inside := models_folder(data_dir) / name).is_dir():
        return inside
    path = Path(os.path.expanduser(name))
    with contextlib.suppress(OSError, ValueError):  # a name too long, a folder not to be looked into
        if name and path.is_dir():
            return path.resolve()
    if name == STARTER:
        raise NotFound("starter_missing")
    raise NotFound("model_missing", model=name, folder=models_folder(data_dir))


def is_plain(name: str) -> bool:
    """Whether a name can only mean something right inside the models' folder."""
    return bool(name) and name == Path(name).name and not name.startswith(".")


def inside(name: str, data_dir: Path) -> Path:
    """The folder of a model of the data folder, and of no other place. Raises NotFound("model_missing")."""
    folder = models_folder(data_dir) / name
    if not is_plain(name) or not folder.is_dir():
        raise NotFound("model_missing", model=name, folder=models_folder(data_dir))
    return folder


def models(data_dir: Path) -> list[InstalledModel]:
    """Every whole model of the data folder, by name; damaged and half-made ones are left out."""
    return [model for model in everything(data_dir) if model.problem is None]


def everything(data_dir: Path) -> list[InstalledModel]:
    """Every model of the data folder, by name; what is wrong with one stands in its `problem`."""
    folder = models_folder(data_dir)
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [_entry(path) for path in paths if path.is_dir() and not path.name.startswith(".")]


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where there is none."""
    if not folder.is_dir():
        return 0
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _entry(path: Path) -> InstalledModel:
    label = "models.starter" if path.name == STARTER else ""
    family, told, problem = None, None, None
    try:
        family, told = family_of(path), manifest.read(path)
    except ModelError as error:
        problem = error
    licence, date, quantize = (told.licence, told.date, told.quantize) if told else ("", "", "")
    return InstalledModel(path.name, path, family, label, folder_size(path), licence, date, quantize, problem)
