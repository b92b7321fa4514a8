"""A file on its way: NAME.part, and NAME.part.json, the journal of what is safely in it.

The journal is written only after the bytes it tells of are on the disk, so a killed program or a power cut
loses at most what came since. The file gets its own name once it is whole and checked, never before.
"""

from __future__ import annotations

import errno
import json
import os
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from glmui.durable import rewrite, settle

FULL = (errno.ENOSPC, errno.EDQUOT)
Piece = tuple[int, int]  # from, to (excluded), in bytes


class PartFile:
    """Bytes come in any order, from one thread; only `save` may run in another meanwhile."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.size = 0
        self.unsaved = 0
        self._identity = ""
        self._done: list[Piece] = []
        self._path = file.with_name(f"{file.name}.part")
        self._journal = file.with_name(f"{file.name}.part.json")
        self._opened: BinaryIO | None = None

    @property
    def path(self) -> Path:
        return self._path

    @property
    def have(self) -> int:
        return sum(end - start for start, end in self._done)

    def open(self, size: int, identity: str) -> None:
        """Go on from what an earlier run left, or start over where that was another content."""
        self.close()
        self.size, self._identity = size, identity
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._read_journal()
        if kept is None or not identity:
            self.start_over()
            return
        self._done = kept
        self._opened = self._path.open("r+b", buffering=0)

    def start_over(self) -> None:
        """Throw away what came; take the room for all of it on the disk. Raises OSError if there is none."""
        self.close()
        self._journal.unlink(missing_ok=True)
        self._done, self.unsaved = [], 0
        self._opened = self._path.open("wb", buffering=0)
        _allocate(self._opened, self.size)

    def missing(self, start: int = 0, end: int | None = None) -> Iterator[Piece]:
        """The gaps between `start` and `end`, in order."""
        end = self.size if end is None else end
        for done_start, done_end in self._done:
            if done_start > start:
                yield start, min(done_start, end)
            start = max(start, done_end)
            if start >= end:
                return
        if start < end:
            yield start, end

    def write(self, place: int, data: bytes) -> None:
        assert self._opened
        self._opened.seek(place)
        view = memoryview(data)
        while view:  # an unbuffered file may take less than it is given
            view = view[self._opened.write(view) :]
        self.unsaved += len(data)
        self._add(place, place + len(data))

    def state(self) -> dict[str, Any]:
        """What `save` is to tell: taken in the thread that writes, so that nothing later is in it."""
        return {"size": self.size, "identity": self._identity, "done": list(self._done)}

    def save(self, state: dict[str, Any]) -> None:
        """Flush the bytes, then the journal that tells of them."""
        if self._opened:
            os.fsync(self._opened.fileno())
            rewrite(self._journal, json.dumps(state))

    def close(self) -> None:
        if self._opened:
            self._opened.close()
            self._opened = None

    def discard(self) -> None:
        """Leave nothing of it."""
        self.close()
        self._journal.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the file its name. To be called once its content is checked."""
        assert self._opened
        os.fsync(self._opened.fileno())
        self.close()
        settle(self._path, self.file)
        self._journal.unlink(missing_ok=True)

    def _add(self, start: int, end: int) -> None:
        """Into the sorted list of pieces, joined with its neighbours."""
        place = bisect_left(self._done, (start, end))
        if place and self._done[place - 1][1] >= start:
            place -= 1
            start, end = self._done[place][0], max(self._done[place][1], end)
            del self._done[place]
        while place < len(self._done) and self._done[place][0] <= end:
            end = max(end, self._done.pop(place)[1])
        self._done.insert(place, (start, end))

    def _read_journal(self) -> list[Piece] | None:
        """What the journal says, or None unless it is whole and tells of this very content."""
        try:
            kept = json.loads(self._journal.read_text(encoding="utf-8"))
            done = [(int(start), int(end)) for start, end in kept["done"]]
            same = (kept["size"], kept["identity"]) == (self.size, self._identity)
            whole = self._path.stat().st_size == self.size
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        edges = [edge for piece in done for edge in piece]
        in_order = edges == sorted(edges) and all(0 <= edge <= self.size for edge in edges)
        return done if same and whole and in_order else None


def _allocate(opened: BinaryIO, size: int) -> None:
    """Take the room now, where the system can: a full disk is better met at once than after an hour."""
    opened.truncate(size)
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(opened.fileno(), 0, size)
        except OSError as error:
            if error.errno in FULL:  # others mean that this file system cannot
                raise
