"""One engine process as the app sees it: started, spoken to, listened to, ended."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
from typing import Any

from glmui.engine import worker
from glmui.engine.wire import Wire, info_from
from glmui.memory.witness import KILLED, Witness
from glmui.types import EngineInfo, EngineSpec


class EngineProcess:
    """Starts at once. Two threads serve the pipe, so that no caller ever waits for the other side.

    info: set once the model is loaded. stopping: its end is meant. signs: grows with every message.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.info: EngineInfo | None = None
        self.stopping = False
        self.signs = 0
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
        self._dead = threading.Event()
        self._ending = threading.Lock()
        self._witness = Witness()
        spawn = multiprocessing.get_context("spawn")  # inherits no socket and no lock
        ours, theirs = spawn.Pipe()
        self._wire = Wire(ours)
        self._process = spawn.Process(
            target=worker.run, args=(theirs, spec), name="glmui-engine", daemon=True
        )
        self._process.start()
        theirs.close()  # else the end of the process would not close the pipe
        threading.Thread(target=self._listen, name="engine-listen", daemon=True).start()
        threading.Thread(target=self._speak, name="engine-speak", daemon=True).start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def dead(self) -> bool:
        return self._dead.is_set()

    def send(self, kind: str, **values: Any) -> None:
        """Hand a message over; it is sent as soon as the process takes it."""
        self._outbox.put((kind, values))

    def next_event(self, seconds: float) -> dict[str, Any] | None:
        """The next message (chunk, error, loaded, failed; died is the last), or None when none came."""
        try:
            return self._events.get(timeout=seconds)
        except queue.Empty:
            return None

    def wake(self) -> None:
        """Let `next_event` return now."""
        self._events.put({"kind": "wake"})

    def stop(self, asked: float = 0.7, killed: float = 10.0) -> None:
        """End the process and wait until it is gone, and its memory with it: asked at first, killed when
        that takes too long. Seconds each; a driver may need some to clear a card up."""
        self.stopping = True
        self.send("stop")
        with self._ending:
            self._process.join(asked)
            if self._process.is_alive():
                self._process.kill()
                self._process.join(killed)
        self._outbox.put(None)

    def exit_code(self) -> int | None:
        """Of a dead process: negative is a signal's number."""
        with self._ending:
            self._process.join(1)
            return self._process.exitcode

    def exit_words(self) -> str:
        """How it ended: "SIGKILL", "exit code 3"."""
        code = self.exit_code()
        if code is not None and code < 0:
            try:
                return signal.Signals(-code).name
            except ValueError:
                return f"signal {-code}"
        return f"exit code {code}"

    def has_crashed(self) -> bool:
        """Whether a dead process's end was its own fault: it did not end itself in good order, nor did the
        kernel, a program or a person kill it."""
        return self.exit_code() not in (0, KILLED)

    def ran_out_of_memory(self) -> bool:
        """Whether it is known that a dead process was ended for want of memory."""
        return self._witness.memory_ran_out(self.exit_code())

    def _listen(self) -> None:
        while True:
            try:
                message = self._wire.receive()
            except (EOFError, OSError):
                break
            self.signs += 1
            if message["kind"] == "loaded":
                self.info = info_from(message["info"])
            if message["kind"] == "alive":  # once a second
                self._witness.look()
            else:
                self._events.put(message)
        self._dead.set()
        self._outbox.put(None)
        self._events.put({"kind": "died"})

    def _speak(self) -> None:
        while (message := self._outbox.get()) is not None:
            kind, values = message
            try:
                self._wire.send(kind, **values)
            except OSError:
                return  # `_listen` notices the end too, and tells
