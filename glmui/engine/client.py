"""The app's side of the engine: a ChatEngine that runs its model in a process of its own.

The process starts with the first message and ends when it is idle, unloaded, hung or no longer the chosen
model. Its end, wanted or not, never reaches further than the reply it was writing. Where memory was what it
ended for, the next one holds less (see ladder.py), and a reply that had no text yet begins anew in it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from glmui import notes
from glmui.engine import wire
from glmui.engine.attempts import POLL_SECONDS, Attempt, Lost, lost
from glmui.engine.model_folder import describe
from glmui.engine.process import EngineProcess
from glmui.engine.request import Cancellations
from glmui.errors import EngineError, ModelError
from glmui.memory.ladder import Ladder, Trouble, at_foot
from glmui.types import Chunk, EngineInfo, EngineSpec, EngineState, GenerationParams, Message, Progress, Usage

log = logging.getLogger(__name__)

MOST_DEATHS, DEATH_MINUTES = 3, 5

Remark = Callable[[EngineInfo, Usage], str]  # notes on a finished reply, "" for none


class EngineClient:
    """See types.ChatEngine. Safe to use from several threads; replies run one at a time, others wait.

    idle_seconds: how long an idle process is kept, 0 for ever. hang_seconds: how long a decode may be mute.
    remark: asked at the end of each reply what else is to be said of it.
    """

    def __init__(
        self,
        spec: EngineSpec | None = None,
        *,
        idle_seconds: float = 1800,
        hang_seconds: float = 30,
        remark: Remark = lambda info, usage: "",
    ) -> None:
        self._ladder = Ladder(spec)
        self._asleep = _describe(spec)
        self._idle_seconds = idle_seconds
        self._hang_seconds = hang_seconds
        self._remark = remark
        self._process: EngineProcess | None = None
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        self._cancelled = Cancellations()
        self._turn = threading.Lock()  # held by the running reply
        self._change = threading.RLock()  # guards what is above; never held while waiting for the model
        self._idle_timer: threading.Timer | None = None
        self._unfinished: tuple[EngineProcess, Attempt] | None = None  # stopped, and not ended yet
        self._unloaded = 0  # how often
        self._closed = False

    def info(self) -> EngineInfo:
        """What the engine holds now; never waits."""
        process, reason = self._process, self._ladder.reason
        if process is None or process.dead or process.stopping:
            state: EngineState = "failed" if self._keeps_dying() else "asleep"
            return replace(self._asleep, state=state, reason=reason)
        if process.info is None:
            return replace(self._asleep, state="loading", pid=process.pid, reason=reason)
        return replace(process.info, pid=process.pid, reason=reason or process.info.reason)

    def stream_chat(
        self, messages: Sequence[Message], params: GenerationParams, request_id: str
    ) -> Iterator[Chunk]:
        """See types.ChatEngine. Raises EngineError: "no_model", "engine_died", "engine_hung",
        "engine_keeps_dying", "out_of_memory", "memory_kept…" where memory ran out in the middle of a reply;
        and whatever loading or generating raises."""
        queued = False
        while not self._turn.acquire(timeout=POLL_SECONDS / 5):
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
        """End the process and wait until its memory is free. A running reply ends as cancelled. What memory
        had taken from the model is given back to it."""
        with self._change:
            self._unloaded += 1
            self._deaths.clear()
            self._ladder.reset()
            self._end_process()

    def configure(self, spec: EngineSpec) -> None:
        """Choose another model or other settings for it; a running reply is finished by the old one."""
        with self._change:
            before = self._ladder.chosen
            if spec == before:
                return
            self._ladder.choose(spec)
            self._asleep = _describe(spec)
            self._deaths.clear()
            same_base = before is not None and spec.base == before.base
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
            self._end_process(killed=0.7)

    # One reply

    def _answer(
        self, messages: Sequence[Message], params: GenerationParams, request_id: str
    ) -> Iterator[Chunk]:
        unloaded, may_retry, hasty = self._unloaded, True, False
        if request_id not in self._cancelled:
            yield Chunk(progress=Progress("starting"))
        while request_id not in self._cancelled and unloaded == self._unloaded:
            self._await_stopped()
            process = self._awake(hasty)
            process.send(
                "chat", id=request_id, **wire.chat_values(list(messages), params, process.spec.extras)
            )
            attempt = Attempt(process, request_id, self._cancelled, self._hang_seconds)
            try:
                for chunk in attempt.chunks():
                    yield self._with_notes(chunk, process)
                return
            except Lost as loss:
                self._bury(process, loss)
                if may_retry and not attempt.spoke and loss.error.code == "card_fault":
                    may_retry = False  # a card that woke from sleep is sound again in a fresh process
                else:
                    self._step_down(process, attempt, loss)
                    hasty = True
            except GeneratorExit:  # the caller has closed the iterator early
                process.send("cancel", id=request_id)
                raise
            finally:
                self._unfinished = (process, attempt) if attempt.unfinished else None
            yield Chunk(progress=Progress("starting"))
        yield Chunk(finish_reason="cancelled")

    def _step_down(self, process: EngineProcess, attempt: Attempt, loss: Lost) -> None:
        """Where memory was the cause, the next process is to hold less. Returns where a reply without text is
        to be tried again; else raises what there is to tell."""
        trouble = Trouble.of(loss.error)
        info = process.info or self._asleep
        with self._change:
            rung = self._ladder.lower(info, trouble) if trouble and self._holds(process) else None
        if rung is None:
            raise (at_foot(trouble) if trouble else loss.error) from None
        log.warning("memory ran out (%s); the next rung: %s %s", trouble, rung.kind, rung.values)
        if attempt.spoke:
            self._ladder.told()
            self._awake(hasty=True)  # loads while the reader reads what happened
            raise EngineError(f"memory_kept.{rung.kind}", **rung.values) from None

    def _with_notes(self, chunk: Chunk, process: EngineProcess) -> Chunk:
        """A reply's last chunk tells what was changed for it, and what else there is to say."""
        if not chunk.finish_reason:
            return chunk
        said = ""
        if process.info and chunk.usage:
            said = self._remark(replace(process.info, pid=process.pid), chunk.usage)
        return replace(chunk, note=notes.join(chunk.note, self._ladder.news(), said))

    def _await_stopped(self) -> None:
        """Let the reply that was stopped last come to its end in the process; one that does not is hung."""
        if self._unfinished is None:
            return
        (process, attempt), self._unfinished = self._unfinished, None
        try:
            attempt.await_obedience()
        except Lost:
            self._end(process)

    def _after_reply(self) -> None:
        with self._change:
            if self._process and (self._process.stopping or not self._holds(self._process)):
                self._end_process()
        self._start_idle_timer()

    # The process

    def _awake(self, hasty: bool = False) -> EngineProcess:
        """The running process, or a new one. hasty: as in EngineSpec, for a new one.

        Raises EngineError("no_model") or ("engine_keeps_dying").
        """
        with self._change:
            spec, process = self._ladder.spec, self._process
            if spec is None or self._closed:
                raise EngineError("no_model")
            if process and process.dead and not process.stopping:
                self._bury(process, lost(process, "loading"))  # it died while nobody looked
            elif process and not process.dead and not process.stopping and self._holds(process):
                process.spec = spec  # its extras may be others
                return process
            self._end_process()
            if self._keeps_dying():
                raise EngineError("engine_keeps_dying", times=MOST_DEATHS, minutes=DEATH_MINUTES)
            self._process = EngineProcess(replace(spec, hasty=hasty))
            return self._process

    def _holds(self, process: EngineProcess) -> bool:
        """Whether the process has what it should; the extras go with each request."""
        spec = self._ladder.spec
        return spec is not None and process.spec.base == spec.base

    def _keeps_dying(self) -> bool:
        deaths = tuple(self._deaths)
        return len(deaths) == MOST_DEATHS and time.monotonic() - deaths[0] < DEATH_MINUTES * 60

    def _bury(self, process: EngineProcess, loss: Lost) -> None:
        """Make sure that nothing of it is left; remember a death that was its own fault, and not memory's
        or somebody's who killed it."""
        with self._change:
            if loss.died:
                self._deaths.append(time.monotonic())
            log.warning("the engine process was lost: %s", loss.error)
            self._end(process)

    def _end_process(self, killed: float = 10.0) -> None:
        if self._process:
            self._end(self._process, killed)

    def _end(self, process: EngineProcess, killed: float = 10.0) -> None:
        with self._change:
            process.stop(killed=killed)
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


def _describe(spec: EngineSpec | None) -> EngineInfo:
    """What can be told of a model that is not loaded."""
    if spec is None:
        return EngineInfo()
    info = EngineInfo(model=spec.model, device=spec.device, threads=spec.threads or 0)
    with contextlib.suppress(ModelError):
        found = describe(spec.folder)
        info = replace(info, family=found.family, context_length=found.context_length)
    return info
