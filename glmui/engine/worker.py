"""The engine process: loads one model, answers one request after the other, ends with its parent.

The main thread computes. One thread listens, so that Stop and the parent's end are noticed in the middle of
a computation; one sends a sign of life every second. torch is imported inside `run`, by the family.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import sys
import threading
import time
import traceback
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from glmui.engine.families import open_family
from glmui.engine.own_process import begin
from glmui.engine.request import Cancellations
from glmui.engine.wire import Wire, chat_from
from glmui.errors import EngineError, GlmuiError, InvalidInput, to_values
from glmui.memory.ladder import Phase
from glmui.memory.trouble import is_card_fault, out_of_memory_on
from glmui.types import ChatEngine, Chunk, EngineSpec, Progress, TakesExtras

SIGN_SECONDS = 1.0
_FIRST_TO_GO = 500  # of 1000: where Linux must end a process for want of memory, this one before the app


def run(connection: Connection, spec: EngineSpec) -> None:
    """Entry of the process. Messages in: chat, cancel, stop; out: loaded or failed, chunk, error, alive."""
    begin()
    if sys.stderr is not None:  # a windowed Python on Windows has none
        faulthandler.enable()
    _offer_to_the_kernel()
    post = _Post(Wire(connection))
    post.start()
    try:
        engine = open_family(spec, post.progress)
    except BaseException as error:
        told = explain(error, "loading", _card_of(spec.device))
        post.send("failed", error=to_values(told), trace=trace_of(error))
        _end()
    post.engine = engine
    post.send("loaded", info=asdict(engine.info()))
    while _answer(engine, post, post.next_chat()):
        pass
    _end()


def _answer(engine: ChatEngine, post: _Post, request: dict[str, Any]) -> bool:
    """Stream one reply. False when the process should end: after memory ran out, or anything unforeseen,
    a fresh process is the one thing that is surely sound."""
    request_id = request["id"]
    if request_id in post.cancelled:
        post.send("chunk", id=request_id, chunk=asdict(Chunk(finish_reason="cancelled")))
        return True
    stage: Phase = "prefill"
    try:
        _use_extras(engine, *request["extras"])
        for chunk in engine.stream_chat(*chat_from(request), request_id):
            stage = "decode" if chunk.tokens else stage
            post.send("chunk", id=request_id, chunk=asdict(chunk))
    except BaseException as error:
        told = explain(error, stage, _card_of(engine.info().device))
        going_on = told is error and told.code != "out_of_memory"
        post.send("error", id=request_id, error=to_values(told), ending=not going_on, trace=trace_of(error))
        return going_on
    return True


def _card_of(device: str) -> str:
    """The card that is used with this device, as far as its name tells."""
    return device if device.startswith(("cuda:", "mps")) else "cuda:0"


def _use_extras(engine: ChatEngine, prefix: str, adapter: str) -> None:
    """See types.TakesExtras. They come with each request, so that other ones need no other process."""
    if isinstance(engine, TakesExtras):
        engine.use_extras(prefix, adapter)
    elif prefix or adapter:
        raise InvalidInput("extras_only_chatglm")


def trace_of(error: BaseException) -> str:
    """What the app's log should hold of an error that nobody foresaw; "" of the others."""
    return "" if isinstance(error, GlmuiError) else "".join(traceback.format_exception(error))


def explain(error: BaseException, stage: Phase = "loading", card: str = "cuda:0") -> GlmuiError:
    """The error in the family's words; want of memory with what was being done, and on which device."""
    if isinstance(error, GlmuiError) and error.code == "out_of_memory":
        return error
    if device := out_of_memory_on(error, card):
        return EngineError("out_of_memory", stage=stage, device=device)
    first_line = (str(error).strip() or "?").splitlines()[0]
    if is_card_fault(error):
        return EngineError("card_fault", detail=first_line)
    if isinstance(error, GlmuiError):
        return error
    return EngineError("engine_failed", detail=f"{type(error).__name__}: {first_line}")


def _offer_to_the_kernel() -> None:
    with contextlib.suppress(OSError):  # Linux alone has this
        Path("/proc/self/oom_score_adj").write_text(str(_FIRST_TO_GO), encoding="ascii")


class _Post:
    """The process's side of the pipe. A broken pipe means that the parent is gone: then this process ends."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._chats: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._request_id = ""
        self.engine: ChatEngine | None = None
        self.cancelled = Cancellations()  # those that came while the model was loading, too

    def start(self) -> None:
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        threading.Thread(target=self._show_life, name="alive", daemon=True).start()

    def send(self, kind: str, **values: Any) -> None:
        try:
            self._wire.send(kind, **values)
        except OSError:
            _end()

    def progress(self, progress: Progress) -> None:
        """Loading, or the current request's prefill."""
        self.send("chunk", id=self._request_id, chunk=asdict(Chunk(progress=progress)))

    def next_chat(self) -> dict[str, Any]:
        self._request_id = ""
        request = self._chats.get()
        self._request_id = request["id"]
        return request

    def _listen(self) -> None:
        while True:
            try:
                message = self._wire.receive()
            except (EOFError, OSError):
                _end()
            if message["kind"] == "chat":
                self._chats.put(message)
            elif message["kind"] == "stop":
                _end()
            else:
                self.cancelled.add(message["id"])
                if self.engine:
                    self.engine.cancel(message["id"])

    def _show_life(self) -> None:
        while True:
            time.sleep(SIGN_SECONDS)
            self.send("alive")


def _end() -> NoReturn:
    """End at once, whatever the main thread computes; there is nothing here to save."""
    os._exit(0)
