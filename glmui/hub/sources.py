"""Where a model may come from, in the user's order: hubs, mirrors, folders; and what each says it has."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from glmui.errors import InvalidInput
from glmui.hub.catalogue import Offer, hubs


@dataclass(frozen=True, slots=True)
class Source:
    """One place to fetch from.

    name: as people know it ("huggingface", "modelscope", a mirror's host, a folder).
    speaks: whose paths it answers. address: "https://…" without a slash at its end, or the folder's path.
    token: sent to this address alone, never further.
    """

    name: str
    speaks: Literal["huggingface", "modelscope", "folder"]
    address: str
    token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Entry:
    """One file as its source states it. sha256, git (the sha1 of its git blob): "" where it states none.

    where: the address to fetch it from, or its path in a local folder.
    """

    path: str
    size: int
    sha256: str
    git: str
    where: str

    @property
    def identity(self) -> str:
        """What tells this content from a later one at the same place; "" when the source states nothing."""
        return f"sha256:{self.sha256}" if self.sha256 else self.git and f"git:{self.git}"


def from_settings(entries: str, environment: Mapping[str, str]) -> tuple[Source, ...]:
    """The sources that the setting `model_sources` names, in its order.

    environment: HF_ENDPOINT replaces Hugging Face's address, HF_TOKEN goes to Hugging Face itself alone.
    Raises InvalidInput: "bad_setting.model_sources".
    """
    found = [_source(entry.strip(), environment) for entry in entries.split(",") if entry.strip()]
    if not found:
        raise InvalidInput("bad_setting.model_sources", value=entries, where="model_sources")
    return tuple(dict.fromkeys(found))


def from_folder(folder: Path) -> Source:
    """A folder that holds the files of one model, or a folder of such folders."""
    return Source(str(folder), "folder", str(folder))


def _source(entry: str, environment: Mapping[str, str]) -> Source:
    known = hubs()
    if entry == "huggingface":
        if endpoint := environment.get("HF_ENDPOINT", "").strip():
            return _mirror(endpoint, "HF_ENDPOINT")
        return Source(entry, "huggingface", known[entry], environment.get("HF_TOKEN", "").strip())
    if entry == "modelscope":
        return Source(entry, "modelscope", known[entry])
    if "://" in entry:
        return _mirror(entry, "model_sources")
    folder = Path(entry).expanduser()
    if not folder.is_absolute():
        raise InvalidInput("bad_setting.model_sources", value=entry, where="model_sources")
    return from_folder(folder)


def _mirror(address: str, where: str) -> Source:
    """A server that speaks Hugging Face's paths."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInput("bad_setting.model_sources", value=address, where=where)
    return Source(parts.hostname, "huggingface", address.rstrip("/"))


# What a source has of an offer


def repository(source: Source, offer: Offer) -> str:
    """The offer's repository there, "" where it has none."""
    return offer.repos.get(source.speaks, "")


def listing_address(source: Source, repo: str) -> str:
    """Where a hub states its files with sizes and hashes, in one answer."""
    if source.speaks == "modelscope":
        return f"{source.address}/api/v1/models/{repo}/repo/files?Revision=master&Recursive=True"
    return f"{source.address}/api/models/{repo}/revision/main?blobs=true"


def read_listing(source: Source, repo: str, answer: Any) -> dict[str, Entry]:
    """A hub's answer taken apart: path -> Entry. Raises KeyError, TypeError or ValueError for any other."""
    if source.speaks == "modelscope":
        files = [file for file in answer["Data"]["Files"] if file["Type"] != "tree"]
        entries = [_from_modelscope(source, repo, file) for file in files]
    else:
        entries = [_from_huggingface(source, repo, str(answer["sha"]), file) for file in answer["siblings"]]
    return {entry.path: entry for entry in entries}


def _from_huggingface(source: Source, repo: str, commit: str, file: Mapping[str, Any]) -> Entry:
    """`commit` pins the address: what is fetched is what was listed, whatever becomes of the repository."""
    path, lfs = str(file["rfilename"]), file.get("lfs") or {}
    where = f"{source.address}/{repo}/resolve/{urllib.parse.quote(commit)}/{urllib.parse.quote(path)}"
    git = "" if lfs else _hex(file.get("blobId"), 40)
    return Entry(path, int(lfs.get("size", file["size"])), _hex(lfs.get("sha256"), 64), git, where)


def _from_modelscope(source: Source, repo: str, file: Mapping[str, Any]) -> Entry:
    path = str(file["Path"])
    query = urllib.parse.urlencode({"Revision": "master", "FilePath": path})
    where = f"{source.address}/api/v1/models/{repo}/repo?{query}"
    return Entry(path, int(file["Size"]), _hex(file.get("Sha256"), 64), "", where)


def _hex(value: Any, length: int) -> str:
    """The hash, or "" where there is none. A string of another form is no hash."""
    text = str(value or "").lower()
    return text if len(text) == length and set(text) <= set("0123456789abcdef") else ""


def list_folder(source: Source, offer: Offer) -> dict[str, Entry]:
    """What a folder has of the offer: in itself, or in a folder named like the model or its repository."""
    root = Path(source.address)
    names = [offer.name, *(name for repo in offer.repos.values() for name in (repo, repo.rpartition("/")[2]))]
    for folder in (*(root / name for name in names), root):
        found = [file.path for file in offer.files if (folder / file.path).is_file()]
        if found:
            return {path: _from_file(path, folder / path) for path in found}
    return {}


def _from_file(path: str, file: Path) -> Entry:
    return Entry(path, file.stat().st_size, "", "", str(file))
