"""One file from one source: pieces over several connections at once, into a part file."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import cast

import httpx

from glmui.hub.part import PartFile, Piece
from glmui.hub.patience import Patience
from glmui.hub.sources import Entry, Source
from glmui.hub.web import Answer, Trouble, Web, refusal
from glmui.text.model_files import accident

log = logging.getLogger(__name__)

_BLOCK = 1 << 20


class Changed(Exception):
    """The source has another content by now; what came of the old one is of no use."""


class _NoRanges(Exception):
    """The server sends the whole file whatever is asked."""


class Transfer:
    """Fills `part` (opened, of the entry's size) with what is missing. For one `run`.

    by_tag: another ETag than before means another content. The servers behind one address may each have their
    own, so where a hash is known the second such finding need not count.
    """

    def __init__(
        self, web: Web, source: Source, entry: Entry, part: PartFile, patience: Patience, by_tag: bool = True
    ) -> None:
        self._web = web
        self._source = source
        self._entry = entry
        self._part = part
        self._patience = patience
        self._by_tag = by_tag
        self._todo: deque[Piece] = deque()
        self._tags: dict[str, str] = {}  # host -> the ETag it gave
        self._came = 0  # bytes, in this run
        self._wholes = 0  # how often a whole file came in place of a piece
        self._saving = asyncio.Lock()
        self._saved_at = time.monotonic()

    async def run(self) -> None:
        """Raises Trouble once the source is given up, Changed, or OSError of the disk. What came is kept."""
        try:
            await self._fill()
        except _NoRanges:
            log.info("%s answers no ranges; fetching %s whole", self._source.name, self._entry.path)
            await self._persist(self._take_whole)
        finally:
            with contextlib.suppress(OSError):  # a full disk: told by what failed first
                self._part.save(self._part.state())

    async def _fill(self) -> None:
        self._todo.extend(piece for gap in self._part.missing() for piece in self._cut(gap))
        workers = min(self._patience.connections, len(self._todo))
        tasks = [asyncio.create_task(self._work()) for _ in range(workers)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _cut(self, gap: Piece) -> list[Piece]:
        """A gap in pieces: no larger than a request should be, small enough that every connection has one."""
        share = -(-self._part.size // self._patience.connections)
        step = max(1, min(self._patience.piece_bytes, max(share, _BLOCK)))
        start, end = gap
        return [(place, min(place + step, end)) for place in range(start, end, step)]

    async def _work(self) -> None:
        while self._todo:
            await self._persist(self._take_piece)

    async def _persist(self, action: Callable[[], Awaitable[None]]) -> None:
        """Do `action` until it succeeds, waiting longer each time; give up when no new byte comes."""
        vain, since = 0, time.monotonic()
        while True:
            came = self._came
            try:
                await action()
                return
            except Trouble as trouble:
                if self._came > came:
                    vain, since = 0, time.monotonic()
                vain += 1
                late = time.monotonic() - since > self._patience.give_up_seconds
                log.info("%s of %s: %s", self._entry.path, self._source.name, trouble.reason)
                if not trouble.again or late or vain >= self._patience.tries:
                    raise
                await asyncio.sleep(max(trouble.wait, self._patience.pause(vain)))

    async def _take_piece(self) -> None:
        """Fetch the next piece; what of it did not come goes back for the next try."""
        if not self._todo:
            return
        start, end = self._todo.popleft()
        headers = {"Range": f"bytes={start}-{end - 1}"}
        try:
            async with self._web.get(self._entry.where, self._source, headers, self._tags) as answer:
                await self._check(answer, start, end)
                await self._receive(answer.response, start, end)
        finally:
            self._todo.extendleft(reversed(list(self._part.missing(start, end))))

    async def _take_whole(self) -> None:
        """Fetch the file from its first byte in one stream; one that broke brings nothing that lasts."""
        came = self._came
        try:
            async with self._web.get(self._entry.where, self._source) as answer:
                if answer.response.status_code != 200:
                    raise refusal(answer)
                self._same_content(answer)
                await self._is_the_file(answer.response)
                await self._receive(answer.response, 0, self._part.size)
        except Trouble:
            self._came = came
            raise

    async def _check(self, answer: Answer, start: int, end: int) -> None:
        """Is this the piece that was asked for? Raises Trouble, Changed or _NoRanges."""
        response = answer.response
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code in (206, 416) and total.isdecimal() and int(total) != self._part.size:
            raise Changed
        if response.status_code not in (200, 206):
            raise refusal(answer)
        self._same_content(answer)
        if response.status_code == 200:
            await self._is_the_file(response)
            if start == 0 and end == self._part.size:
                return
            self._wholes += 1
            raise Trouble("no ranges") if self._wholes < 2 else _NoRanges
        match = re.fullmatch(r"bytes (\d+)-(\d+)/\d+", response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != start or not start <= int(match[2]) < end:
            raise Trouble("wrong Content-Range")

    def _same_content(self, answer: Answer) -> None:
        """Raises Changed: the hub states another hash than it listed, or a host another ETag than before."""
        if len(answer.linked) == 64 and answer.linked != (self._entry.sha256 or answer.linked):
            raise Changed
        tag = answer.response.headers.get("ETag", "")
        if not self._by_tag or not tag or tag.startswith("W/"):
            return
        if self._tags.setdefault(answer.host, tag) != tag:
            raise Changed

    async def _is_the_file(self, response: httpx.Response) -> None:
        """A whole answer has the file's length; what else it may be is told by its beginning."""
        if response.headers.get("Content-Length", str(self._part.size)) == str(self._part.size):
            return
        start = b""
        async with _blocks(response) as blocks:
            async for block in blocks:
                start += block
                if len(start) >= 200:
                    break
        if reason := accident(start):
            raise Trouble(reason)
        raise Changed

    async def _receive(self, response: httpx.Response, place: int, end: int) -> None:
        """Write the body as it comes, up to `end` at most. Raises Trouble for a short or slow one."""
        since, came = time.monotonic(), 0
        async with _blocks(response) as blocks:
            async for block in blocks:
                block = block[: end - place]
                self._part.write(place, block)
                place += len(block)
                came += len(block)
                self._came += len(block)
                await self._save_in_time()
                if place >= end:
                    return
                if time.monotonic() - since > self._patience.stall_seconds:
                    if came < self._patience.stall_bytes:
                        raise Trouble("timeout")
                    since, came = time.monotonic(), 0
        raise Trouble("cut short")

    async def _save_in_time(self) -> None:
        """Every connection waits here while the disk is flushed, which bounds what a kill may cost."""
        if not self._is_time():
            return
        async with self._saving:
            if self._is_time():
                state, self._part.unsaved = self._part.state(), 0
                saving = asyncio.create_task(asyncio.to_thread(self._part.save, state))
                try:
                    await asyncio.shield(saving)
                finally:  # cancelled or not, nobody else saves meanwhile
                    await asyncio.wait({saving})
                self._saved_at = time.monotonic()

    def _is_time(self) -> bool:
        late = time.monotonic() - self._saved_at > self._patience.save_seconds
        return self._part.unsaved >= self._patience.save_bytes or (late and self._part.unsaved > 0)


def _blocks(response: httpx.Response) -> contextlib.aclosing[AsyncGenerator[bytes, None]]:
    """The body as it comes, closed at the end of its `with` and not whenever the collector comes by."""
    return contextlib.aclosing(cast("AsyncGenerator[bytes, None]", response.aiter_raw()))
