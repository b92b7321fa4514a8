"""The app's side of the engine: a ChatEngine that runs its model in a process of its own.

The process starts with the first message and ends when it is idle, unloaded, hung or no longer the chosen
model. Its end, wanted or not, never reaches further than the reply it was writing.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from glmui.engine import wire
from glmui.engine.model_folder import describe
from glmui.engine.process import EngineProcess
from glmui.engine.request import Cancellations
from glmui.errors import EngineError, ModelError
from glmui.types import Chunk, EngineInfo, EngineSpec, GenerationParams, Message, Progress

log = logging.getLogger(__name__)

MOST_DEATHS, DEATH_MINUTES = 3, 5

_POLL_SECONDS = 0.25
_STOP_GRACE = 1.0  # a cancelled reply is over for the reader after so long, whatever the process still does
_STOP_PATIENCE = 5.0  # and a process that has not obeyed by then, once it is wanted again, is ended
_QUIET_FACTOR = 4  # a load or prefill may hold even the sign of life back (a library read from a slow disk)


class EngineClient:
    """See types.ChatEngine. Safe to use from several threads; replies run one at a time, others wait.

    idle_seconds: how long an idle process is kept, 0 for ever. hang_seconds: how long a decode may be mute.
    """

    def __init__(
        self, spec: EngineSpec | None = None, *, idle_seconds: float = 1800, hang_seconds: float = 30
    ) -> None:
        self._spec = spec
        self._asleep = _describe(spec)
        self._idle_seconds = idle_seconds
        self._hang_seconds = hang_seconds
        self._process: EngineProcess | None = None
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        self._cancelled = Cancellations()
        self._turn = threading.Lock()  # held by the running reply
        self._change = threading.RLock()  # guards what is above; never held while waiting for the model
        self._idle_timer: threading.Timer | None = None
        self._stopping: tuple[EngineProcess, str] | None = None  # a stopped reply that has not ended yet
        self._closed = False

    def info(self) -> EngineInfo:
        """What the engine holds now; never waits."""
        process = self._process
        if process is None or process.dead:
            return replace(self._asleep, state="failed" if self._keeps_dying() else "asleep")
        if process.info is None:
            return replace(self._asleep, state="loading", pid=process.pid)
        return replace(process.info, pid=process.pid)

    def stream_chat(
        self, messages: Sequence[Message], params: GenerationParams, request_id: str
    ) -> Iterator[Chunk]:
        """See types.ChatEngine. Raises EngineError: "no_model", "engine_died", "engine_hung",
        "engine_keeps_dying", "out_of_memory"; and whatever loading or generating raises."""
        queued = False
        while not self._turn.acquire(timeout=_POLL_SECONDS / 5):
            if request_id in self._cancelled:
                yield Chunk(finish_reason="cancelled")
                return
            if not queued:
                queued = True
                yield Chunk(progress=Progress("queued"))
        try:
            self._stop_idle_timer()
            yield from self._answer(messages, params, request_id)
        finally:
            self._after_reply()
            self._turn.release()

    def cancel(self, request_id: str) -> None:
        """See types.ChatEngine. While the model still loads, loading ends too."""
        self._cancelled.add(request_id)
        if process := self._process:
            process.wake()

    def unload(self) -> None:
        """End the process and wait until its memory is free. A running reply ends as cancelled."""
        with self._change:
            self._deaths.clear()
            self._end_process()

    def configure(self, spec: EngineSpec) -> None:
        """Choose another model or other settings for it; a running reply is finished by the old one."""
        with self._change:
            if spec == self._spec:
                return
            same_base = self._spec is not None and spec.base == self._spec.base
            self._spec, self._asleep = spec, _describe(spec)
            self._deaths.clear()
            if not same_base and self._turn.acquire(blocking=False):
                try:
                    self._end_process()
                finally:
                    self._turn.release()

    def set_idle_seconds(self, seconds: float) -> None:
        """Keep an idle process so long from now on; 0 for ever."""
        self._idle_seconds = seconds
        if self._turn.acquire(blocking=False):
            try:
                self._start_idle_timer()
            finally:
                self._turn.release()

    def close(self) -> None:
        """End the process for good, within two seconds."""
        self._closed = True
        self._stop_idle_timer()
        with self._change:
            self._end_process()

    # One reply

    def _answer(
        self, messages: Sequence[Message], params: GenerationParams, request_id: str
    ) -> Iterator[Chunk]:
        if request_id in self._cancelled:
            yield Chunk(finish_reason="cancelled")
            return
        yield Chunk(progress=Progress("starting"))
        self._await_stopped()
        process = self._awake()
        process.send("chat", id=request_id, **wire.chat_values(list(messages), params, process.spec.extras))
        try:
            yield from self._follow(process, request_id)
        finally:
            process.send("cancel", id=request_id)  # the caller may have closed the iterator early

    def _follow(self, process: EngineProcess, request_id: str) -> Iterator[Chunk]:
        """The process's chunks for this request, up to the last; its errors raised here."""
        silence, stop = _Silence(process, self._hang_seconds), _Stop()
        while True:
            event = process.next_event(_POLL_SECONDS)
            if request_id in self._cancelled and not stop.asked:
                if process.info is None:
                    self._end(process)
                stop.ask()
                process.send("cancel", id=request_id)
            if event is None:
                if silence.too_long():
                    self._bury(process)
                    raise EngineError("engine_hung", seconds=round(self._hang_seconds))
            elif event["kind"] == "died" and not stop.asked and not process.stopping:
                self._bury(process)
                raise EngineError("engine_died", detail=process.exit_words())
            elif event["kind"] == "loaded":
                silence.heard()
            elif (chunk := self._chunk(process, event, request_id)) is not None:
                silence.heard(chunk)
                yield chunk
                if chunk.finish_reason:
                    return
            if process.stopping or stop.over() or (stop.asked and process.dead):
                self._stopping = None if process.stopping or process.dead else (process, request_id)
                yield Chunk(finish_reason="cancelled")
                return

    def _chunk(self, process: EngineProcess, event: dict[str, Any], request_id: str) -> Chunk | None:
        """The event's chunk where it belongs to this reply. Raises the error that it tells of."""
        if event.get("trace"):
            log.error("the engine failed\n%s", event["trace"])
        if event["kind"] == "failed" or event.get("ending"):
            self._end(process)
            raise wire.error_from(event["error"])
        if event["kind"] == "error" and event["id"] == request_id:
            raise wire.error_from(event["error"])
        if event["kind"] == "chunk" and event["id"] in ("", request_id):
            return wire.chunk_from(event["chunk"])
        return None

    def _await_stopped(self) -> None:
        """Let the reply that was stopped last come to its end in the process; one that does not is hung."""
        if self._stopping is None:
            return
        (process, request_id), self._stopping = self._stopping, None
        deadline = time.monotonic() + _STOP_PATIENCE
        while not process.dead and not process.stopping:
            event = process.next_event(_POLL_SECONDS)
            if event and event.get("id") == request_id and (event["kind"] == "error" or _is_last(event)):
                return
            if time.monotonic() > deadline:
                log.warning("the engine process did not obey a stop and is ended")
                self._end(process)

    def _after_reply(self) -> None:
        with self._change:
            if self._process and not self._holds(self._process):
                self._end_process()
        self._start_idle_timer()

    # The process

    def _awake(self) -> EngineProcess:
        """The running process, or a new one. Raises EngineError("no_model") or ("engine_keeps_dying")."""
        with self._change:
            if self._spec is None or self._closed:
                raise EngineError("no_model")
            process = self._process
            if process and process.dead and not process.stopping:
                self._bury(process)  # it died while nobody looked
            elif process and not process.dead and not process.stopping and self._holds(process):
                process.spec = self._spec  # its extras may be others
                return process
            self._end_process()
            if self._keeps_dying():
                raise EngineError("engine_keeps_dying", times=MOST_DEATHS, minutes=DEATH_MINUTES)
            self._process = EngineProcess(self._spec)
            return self._process

    def _holds(self, process: EngineProcess) -> bool:
        """Whether the process has the chosen model; the extras go with each request."""
        return self._spec is not None and process.spec.base == self._spec.base

    def _keeps_dying(self) -> bool:
        deaths = tuple(self._deaths)
        return len(deaths) == MOST_DEATHS and time.monotonic() - deaths[0] < DEATH_MINUTES * 60

    def _bury(self, process: EngineProcess) -> None:
        """It died or hung by itself: remember that, and make sure that nothing of it is left."""
        with self._change:
            self._deaths.append(time.monotonic())
            log.warning(
                "the engine process died or hung: %s", process.exit_words() if process.dead else "hung"
            )
            self._end(process)

    def _end_process(self) -> None:
        if self._process:
            self._end(self._process)

    def _end(self, process: EngineProcess) -> None:
        with self._change:
            process.stop()
            if self._process is process:
                self._process = None

    # Idle

    def _start_idle_timer(self) -> None:
        self._stop_idle_timer()
        if self._idle_seconds > 0 and self._process:
            self._idle_timer = threading.Timer(self._idle_seconds, self._unload_idle)
            self._idle_timer.daemon = True
            self._idle_timer.start()

    def _stop_idle_timer(self) -> None:
        if self._idle_timer:
            self._idle_timer.cancel()

    def _unload_idle(self) -> None:
        if self._turn.acquire(blocking=False):
            try:
                with self._change:
                    self._end_process()
            finally:
                self._turn.release()


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
        self._waited += _POLL_SECONDS
        return self._waited > self._seconds * (_QUIET_FACTOR if self._patient else 1)


class _Stop:
    """Whether Stop was asked for, and whether the process has had its time to answer."""

    def __init__(self) -> None:
        self.asked = False
        self._deadline = 0.0

    def ask(self) -> None:
        self.asked = True
        self._deadline = time.monotonic() + _STOP_GRACE

    def over(self) -> bool:
        return self.asked and time.monotonic() > self._deadline


def _is_last(event: dict[str, Any]) -> bool:
    return event["kind"] == "chunk" and event["chunk"].get("finish_reason") is not None


def _describe(spec: EngineSpec | None) -> EngineInfo:
    """What can be told of a model that is not loaded."""
    if spec is None:
        return EngineInfo()
    info = EngineInfo(model=spec.model, device=spec.device, threads=spec.threads or 0)
    with contextlib.suppress(ModelError):
        found = describe(spec.folder)
        info = replace(info, family=found.family, context_length=found.context_length)
    return info
