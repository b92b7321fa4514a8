"""A model's files, from the first source that has them whole."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glmui.errors import FetchError
from glmui.hub.catalogue import Offer
from glmui.hub.fetch import Fetch, Place
from glmui.hub.part import FULL
from glmui.hub.patience import PATIENT, Patience
from glmui.hub.sources import Source
from glmui.store.lock import lock_descriptor
from glmui.types import Progress, Stage

OnProgress = Callable[[Progress], None]

_TICK_SECONDS = 0.1
_TOLD_SECONDS = 0.2
_SPEED_SECONDS = 5.0


class Control:
    """Pause, resume and cancel a download from any thread. A cancelled one stays cancelled."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        self._paused = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def paused(self) -> bool:
        return self._paused.is_set() and not self.cancelled

    def cancel(self) -> None:
        self._cancelled.set()

    def pause(self) -> None:
        self._paused.set()

    def resume(self) -> None:
        self._paused.clear()


def download(
    offer: Offer,
    target: Path,
    sources: Sequence[Source],
    on_progress: OnProgress,
    control: Control,
    patience: Patience = PATIENT,
) -> Mapping[str, str]:
    """Fetch every file of `offer` into the folder `target`; {path: sha256 that was confirmed}.

    What a killed, failed or cancelled download left in `target` is gone on from. A file gets its name only
    when it is whole and its hash is right; one whose hash nobody stated (from a local folder, or over plain
    HTTP) is left out of the result. Besides the files, `target` holds .checked.json and .lock.
    Progress, at most five a second, in the calling thread: "fetching" with done and total (bytes of the
    model) and per_second, or "checking" (bytes of the file `detail`). While paused it waits.

    Raises FetchError: "fetch_cancelled", "disk_too_full", "disk_full_fetching", "fetch_unwritable",
    "download_running", "source_none", "sources_failed", "sources_away", "sources_wrong_hash",
    "proxy_unusable".
    """
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(target):
            return _drive(lambda: Fetch(offer, target, sources, patience), _Teller(on_progress), control)
    except OSError as error:
        if error.errno in FULL:
            raise FetchError("disk_full_fetching", folder=target) from error
        raise FetchError("fetch_unwritable", folder=target, detail=error.strerror or error) from error


def _drive(begin: Callable[[], Fetch], teller: _Teller, control: Control) -> dict[str, str]:
    """Run fetches until one ends by itself: a pause ends one, which costs nothing but its connections."""
    while True:
        if control.cancelled:
            raise FetchError("fetch_cancelled")
        if control.paused:
            time.sleep(_TICK_SECONDS)
            continue
        found = _run(_watch(begin(), teller, control))
        if found is not None:
            return found


async def _watch(fetch: Fetch, teller: _Teller, control: Control) -> dict[str, str] | None:
    """The fetch's result, or None where it was paused or cancelled meanwhile."""
    running = asyncio.create_task(fetch.run())
    place = fetch.place
    teller.begin()
    try:
        while not running.done():
            await asyncio.wait({running}, timeout=_TICK_SECONDS)
            place = fetch.place
            teller.tell(place)
            if control.cancelled or control.paused:
                break
        return running.result() if running.done() else None
    finally:
        await _end([running])
        teller.end(place)


def _run(main: Coroutine[Any, Any, dict[str, str] | None]) -> dict[str, str] | None:
    """asyncio.run, but without waiting for its threads: a name look-up may hang for half a minute."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(main)
    try:
        return loop.run_until_complete(task)
    finally:
        loop.run_until_complete(_end(asyncio.all_tasks(loop)))  # after Ctrl+C all of them
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Teller:
    """Turns places into Progress, five times a second, with a speed smoothed over some seconds."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._past: deque[tuple[float, int]] = deque()
        self._told = 0.0

    def begin(self) -> None:
        """Sources are being asked what they have."""
        self._past.clear()
        self._on_progress(Progress("fetching"))

    def tell(self, place: Place) -> None:
        now = time.monotonic()
        if now - self._told < _TOLD_SECONDS or not place.total:
            return
        self._told = now
        if self._past and place.done < self._past[-1][1]:  # another file is checked, or one started over
            self._past.clear()
        self._past.append((now, place.done))
        while now - self._past[0][0] > _SPEED_SECONDS:
            self._past.popleft()
        (_, before), seconds = self._past[0], now - self._past[0][0]
        self._send(place, (place.done - before) / seconds if seconds > 0 else 0.0)

    def end(self, place: Place) -> None:
        """The last word of a fetch: nothing moves any more."""
        if place.total:
            self._send(place, 0.0)

    def _send(self, place: Place, per_second: float) -> None:
        fraction = min(place.done / place.total, 1.0)
        stage: Stage = "checking" if place.checking else "fetching"
        self._on_progress(Progress(stage, fraction, place.file, place.done, place.total, per_second))


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Two programs must not write the same files."""
    with (target / ".lock").open("ab") as opened:
        try:
            lock_descriptor(opened.fileno())
        except OSError as error:
            raise FetchError("download_running", folder=target) from error
        yield
