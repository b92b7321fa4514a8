"""All files of an offer, one after the other, each from the first source that has it right."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmui.errors import FetchError
from glmui.hub.catalogue import Offer, RemoteFile
from glmui.hub.checked import Checked, Mark
from glmui.hub.contents import copy, digests
from glmui.hub.listings import Listings
from glmui.hub.part import PartFile
from glmui.hub.patience import Patience
from glmui.hub.sources import Entry, Source, repository
from glmui.hub.transfer import Changed, Transfer
from glmui.hub.web import Trouble, Web, is_safe
from glmui.text.model_files import accident

log = logging.getLogger(__name__)

_SPARE_BYTES = 10**9
_RESTARTS = 3  # of one file, because its source has another content by now
_WRONG = "wrong sha256"
_AWAY = {"no connection", "timeout", "proxy", "TLS certificate", "connection broken"}


@dataclass(frozen=True, slots=True)
class Place:
    """How far a fetch is, in bytes of the model; checking: of the one file that is read for its hash."""

    file: str
    done: int
    total: int
    checking: bool = False


class Fetch:
    """One run over an offer's files into the folder `target`. `place` tells at any time how far it is."""

    def __init__(self, offer: Offer, target: Path, sources: Sequence[Source], patience: Patience) -> None:
        self._offer = offer
        self._target = target
        self._sources = [s for s in sources if s.speaks == "folder" or repository(s, offer)]
        self._names = ", ".join(source.name for source in sources)
        self._patience = patience
        self._checked = Checked(target)
        self._web = Web(patience.connections, patience.stall_seconds)
        self._listings = Listings(self._web, offer, patience)
        self._file = ""
        self._part: PartFile | None = None
        self._finished = 0  # bytes of the files that are there
        self._total = 0
        self._hashed: tuple[int, int] | None = None  # done, total
        self._ended = False

    @property
    def place(self) -> Place:
        if self._hashed:
            return Place(self._file, *self._hashed, checking=True)
        came = self._part.have if self._part else 0
        return Place(self._file, self._finished + came, max(self._total, self._finished + came))

    async def run(self) -> dict[str, str]:
        """{path: sha256 that was confirmed}. Raises FetchError, or OSError of the disk."""
        try:
            missing = [file for file in self._offer.files if not self._mark(file)]
            if missing:
                await self._plan()
            for file in missing:
                await self._one(file)
        finally:
            self._ended = True
            await self._web.close()
        marks = {file.path: self._mark(file) for file in self._offer.files}
        return {path: mark.sha256 for path, mark in marks.items() if mark and mark.confirmed}

    def _mark(self, file: RemoteFile) -> Mark | None:
        """The note that the file is there and right, by what the catalogue says of it today."""
        mark = self._checked.get(file.path)
        return mark if mark and mark.sha256 == (file.sha256 or mark.sha256) else None

    async def _plan(self) -> None:
        """Learn the sizes, and whether the disk has room. Raises FetchError."""
        if not self._sources:
            raise FetchError("source_none", model=self._offer.name, sources=self._names)
        sizes = {file.path: file.size for file in self._offer.files}
        for source in self._sources:
            if None not in sizes.values():
                break
            with contextlib.suppress(Trouble):
                entries = await self._listings.all(source)
                sizes = {p: entries[p].size if n is None and p in entries else n for p, n in sizes.items()}
        self._total = sum(size or 0 for size in sizes.values())
        self._finished = sum(sizes[file.path] or 0 for file in self._offer.files if self._mark(file))
        self._make_sure_of_room()

    def _make_sure_of_room(self) -> None:
        """Twice the size, for the import writes the model once more, and a spare gigabyte."""
        here = sum(_on_disk(file) for file in self._target.rglob("*"))
        need, free = 2 * self._total + _SPARE_BYTES - here, shutil.disk_usage(self._target).free
        if free < need:
            raise FetchError("disk_too_full", folder=self._target, need=-(-need // 10**6), free=free // 10**6)

    async def _one(self, file: RemoteFile) -> None:
        self._file = file.path
        tried: list[tuple[str, str]] = []
        for source in self._sources:
            try:
                size = await self._from(source, file)
            except Trouble as trouble:
                log.warning("%s from %s: %s", file.path, source.name, trouble.reason)
                tried.append((source.name, trouble.reason))
            else:
                self._finished += size
                return
        raise self._failure(file, tried)

    async def _from(self, source: Source, file: RemoteFile) -> int:
        """Bring the file from there, checked and under its name; its size. Raises Trouble."""
        entry = await self._stated(source, file)
        if await self._is_here_already(file, entry):
            return entry.size
        part = self._part = PartFile(self._target / file.path)
        try:
            for _ in range(2):  # a wrong hash: once more from the start
                entry = await self._fill(source, file, entry, part)
                if sha256 := await self._right_hash(part.path, file, entry):
                    part.finish()
                    self._checked.add(file.path, sha256, _is_confirmed(file, entry))
                    return entry.size
                part.discard()
                self._listings.forget(source)
                entry = await self._stated(source, file)
            raise Trouble(_WRONG, again=False)
        finally:
            part.close()
            self._part = None

    async def _stated(self, source: Source, file: RemoteFile) -> Entry:
        """What the source states, once it agrees with the catalogue. Raises Trouble."""
        entry = await self._listings.entry(source, file.path)
        if file.size not in (None, entry.size):
            raise Trouble("size differs from the catalogue", again=False)
        if file.sha256 and entry.sha256 and file.sha256 != entry.sha256:
            raise Trouble("sha256 differs from the catalogue", again=False)
        return entry

    async def _fill(self, source: Source, file: RemoteFile, entry: Entry, part: PartFile) -> Entry:
        """Until the part is whole; the entry it came by. Raises Trouble."""
        for restart in range(_RESTARTS + 1):
            part.open(entry.size, f"sha256:{file.sha256}" if file.sha256 else entry.identity)
            try:
                if source.speaks == "folder":
                    await copy(Path(entry.where), part)
                else:
                    by_tag = restart == 0 or not entry.identity
                    await Transfer(self._web, source, entry, part, self._patience, by_tag).run()
                return entry
            except Changed:
                log.info("%s changed at %s", file.path, source.name)
                part.discard()
                self._listings.forget(source)
                entry = await self._stated(source, file)
        raise Trouble("changes all the time", again=False)

    async def _is_here_already(self, file: RemoteFile, entry: Entry) -> bool:
        """A whole file that was not noted: the program ended between the one and the other."""
        path = self._target / file.path
        if not (file.sha256 or entry.identity) or not path.is_file() or path.stat().st_size != entry.size:
            return False
        sha256 = await self._right_hash(path, file, entry)
        if sha256:
            self._checked.add(file.path, sha256, _is_confirmed(file, entry))
        return bool(sha256)

    async def _right_hash(self, path: Path, file: RemoteFile, entry: Entry) -> str:
        """The file's sha256, or "" where it is not what catalogue and source state. Raises Trouble."""
        sha256, git = await self._hash(path)
        if not (file.sha256 or entry.identity):
            with path.open("rb") as opened:
                reason = accident(opened.read(200))
            if reason:
                raise Trouble(reason, again=False)
        right = sha256 == (file.sha256 or entry.sha256 or sha256) and git == ((git and entry.git) or git)
        return sha256 if right else ""

    async def _hash(self, path: Path) -> tuple[str, str]:
        total, done = path.stat().st_size, 0

        def count(number: int) -> None:
            nonlocal done
            done += number
            self._hashed = (done, total)

        try:
            return await asyncio.to_thread(digests, path, count, lambda: self._ended)
        finally:
            self._hashed = None

    def _failure(self, file: RemoteFile, tried: Sequence[tuple[str, str]]) -> FetchError:
        """The sentence that fits what all sources did."""
        reasons = {reason for _, reason in tried}
        code = "sources_failed"
        if reasons <= _AWAY:
            code = "sources_away"
        elif _WRONG in reasons and reasons <= _AWAY | {_WRONG}:
            code = "sources_wrong_hash"
        told = ", ".join(f"{name} ({reason})" for name, reason in tried)
        return FetchError(code, model=self._offer.name, file=file.path, tried=told)


def _is_confirmed(file: RemoteFile, entry: Entry) -> bool:
    """The catalogue states the hash, or the source does on a way that nobody else can write to."""
    return bool(file.sha256 or (entry.identity and is_safe(entry.where)))


def _on_disk(file: Path) -> int:
    """Bytes it takes up, which for a file with holes is less than its size."""
    try:
        stat = file.stat()
    except OSError:
        return 0
    return min(stat.st_size, getattr(stat, "st_blocks", 1 << 60) * 512)
