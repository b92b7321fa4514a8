"""What a file holds: its hashes, and the usual accidents of a download."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from glmui.hub.part import PartFile
from glmui.hub.web import Trouble

_BLOCK = 1 << 20
_LARGEST_BLOB = 64 << 20  # a hub keeps what is larger by its sha256


def digests(file: Path, on_bytes: Callable[[int], None], stopped: Callable[[], bool]) -> tuple[str, str]:
    """(sha256, sha1 of the git blob, "" for a large file), read in blocks of 1 MiB."""
    size = file.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    small = size <= _LARGEST_BLOB
    with file.open("rb", buffering=0) as opened:
        while (block := opened.read(_BLOCK)) and not stopped():
            sha256.update(block)
            if small:
                git.update(block)
            on_bytes(len(block))
    return sha256.hexdigest(), git.hexdigest() if small else ""


async def copy(source: Path, part: PartFile) -> None:
    """A local file into the part, from its start. Raises Trouble when it is not as long as it was."""
    place = 0
    for block in _blocks(source):
        part.write(place, block)
        place += len(block)
        await asyncio.sleep(0)
    if place != part.size:
        raise Trouble("wrong size", again=False)


def _blocks(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as opened:
            while block := opened.read(_BLOCK):
                yield block
    except OSError as error:
        raise Trouble("unreadable", again=False) from error
