"""One request put to one engine process: its chunks, and what has become of the process."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

from glmui.engine import wire
from glmui.engine.process import EngineProcess
from glmui.engine.request import Cancellations
from glmui.errors import EngineError, GlmuiError
from glmui.memory.ladder import Phase
from glmui.types import Chunk

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
_STOP_GRACE = 1.0  # a cancelled reply is over for the reader after so long, whatever the process still does
_STOP_PATIENCE = 5.0  # and a process that has not obeyed by then, once it is wanted again, is of no use
_QUIET_FACTOR = 4  # a load or prefill may hold even the sign of life back (a library read from a slow disk)


class Lost(Exception):
    """The process is of no use any more. error: what is told of it. died: its own fault, it died or hung."""

    def __init__(self, error: GlmuiError, died: bool = False) -> None:
        super().__init__(error)
        self.error = error
        self.died = died


class Attempt:
    """spoke: whether text of the reply has come. unfinished: it was stopped for the reader, and the process
    has not obeyed yet."""

    def __init__(
        self, process: EngineProcess, request_id: str, cancelled: Cancellations, hang_seconds: float
    ) -> None:
        self.spoke = False
        self.unfinished = False
        self._process = process
        self._id = request_id
        self._cancelled = cancelled
        self._hang_seconds = hang_seconds
        self._deadline: float | None = None  # of the process's answer, once Stop was asked for

    def chunks(self) -> Iterator[Chunk]:
        """Up to the last. Raises Lost, and the GlmuiError of a reply that failed in a sound process."""
        process, silence = self._process, _Silence(self._process, self._hang_seconds)
        while True:
            event = process.next_event(POLL_SECONDS)
            if self._id in self._cancelled and self._deadline is None:
                self._ask_to_stop()
            if event is None:
                if silence.too_long():
                    raise Lost(EngineError("engine_hung", seconds=round(self._hang_seconds)), died=True)
            elif event["kind"] == "died" and self._deadline is None and not process.stopping:
                raise lost(process, self._stage())
            elif event["kind"] == "loaded":
                silence.heard()
            elif (chunk := self._chunk(event)) is not None:
                silence.heard(chunk)
                self.spoke = self.spoke or bool(chunk.text)
                yield chunk
                if chunk.finish_reason:
                    return
            if process.stopping or self._is_over():
                self.unfinished = not process.stopping and not process.dead
                yield Chunk(finish_reason="cancelled")
                return

    def await_obedience(self) -> None:
        """Let the stopped reply come to its end in the process. Raises Lost where it hangs instead."""
        deadline = time.monotonic() + _STOP_PATIENCE
        while not self._process.dead and not self._process.stopping:
            event = self._process.next_event(POLL_SECONDS)
            if event and event.get("id") == self._id and (event["kind"] == "error" or _is_last(event)):
                return
            if time.monotonic() > deadline:
                log.warning("the engine process did not obey a stop and is ended")
                raise Lost(EngineError("engine_hung", seconds=round(_STOP_PATIENCE)))

    def _ask_to_stop(self) -> None:
        if self._process.info is None:
            self._process.stop(killed=_STOP_GRACE)  # loading hears nothing
        self._deadline = time.monotonic() + _STOP_GRACE
        self._process.send("cancel", id=self._id)

    def _is_over(self) -> bool:
        """Whether Stop was asked for, and the process is gone or has had its time to answer."""
        if self._deadline is None:
            return False
        return self._process.dead or time.monotonic() > self._deadline

    def _chunk(self, event: dict[str, Any]) -> Chunk | None:
        """The event's chunk where it belongs to this reply. Raises the error that it tells of."""
        if event.get("trace"):
            log.error("the engine failed\n%s", event["trace"])
        if event["kind"] == "failed" or event.get("ending"):
            raise Lost(wire.error_from(event["error"]))
        if event["kind"] == "error" and event["id"] == self._id:
            raise wire.error_from(event["error"])
        if event["kind"] == "chunk" and event["id"] in ("", self._id):
            return wire.chunk_from(event["chunk"])
        return None

    def _stage(self) -> Phase:
        if self._process.info is None:
            return "loading"
        return "decode" if self.spoke else "prefill"


def lost(process: EngineProcess, stage: Phase) -> Lost:
    """What is to be said of a process that is dead, and was not meant to be."""
    if process.ran_out_of_memory():
        return Lost(EngineError("out_of_memory", stage=stage, device="cpu"))
    return Lost(EngineError("engine_died", detail=process.exit_words()), died=process.has_crashed())


class _Silence:
    """Tells a hung process from a busy one. Counts waits, not the clock: a laptop may have slept in between.

    A loaded process must take the request and then bring chunk after chunk. While it loads or reads the
    prompt, any sign of life is enough, and for longer.
    """

    def __init__(self, process: EngineProcess, seconds: float) -> None:
        self._process, self._seconds = process, seconds
        self._patient = process.info is None
        self._signs = process.signs
        self._waited = 0.0

    def heard(self, chunk: Chunk | None = None) -> None:
        """The process has loaded, or sent this chunk."""
        self._patient = chunk is not None and chunk.progress is not None
        self._waited = 0.0

    def too_long(self) -> bool:
        """Called after each wait without an event."""
        if self._patient and self._signs != self._process.signs:
            self._waited = 0.0
        self._signs = self._process.signs
        self._waited += POLL_SECONDS
        return self._waited > self._seconds * (_QUIET_FACTOR if self._patient else 1)


def _is_last(event: dict[str, Any]) -> bool:
    return event["kind"] == "chunk" and event["chunk"].get("finish_reason") is not None
