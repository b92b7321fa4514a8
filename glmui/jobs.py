"""Replies in the making: a Job for each, and the one fair queue they wait in."""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from glmui.errors import Busy, GlmuiError
from glmui.types import USUAL, Chunk, FinishReason, Once, Progress, Usage

MAX_WAITING = 32
MAX_PER_CLIENT = 2


@dataclass(slots=True, eq=False)
class Job:
    """One reply being generated. It outlives the browser tab that asked for it.

    `content` holds the whole text so far, a continued reply's earlier part included. `revision`
    grows with every change, so that followers know when to look.
    """

    reply_id: int
    conversation_id: str
    client: str  # whose turn it is: a browser tab, later an API key
    content: str = ""
    once: Once = USUAL
    tokens: int = 0
    progress: Progress | None = field(default_factory=lambda: Progress("queued"))
    left_out: int = 0
    note: str = ""
    usage: Usage | None = None
    finish_reason: FinishReason | None = None
    error: GlmuiError | None = None
    save_error: GlmuiError | None = None  # the disk refused; the text is kept here and saved later
    revision: int = 0
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    first_text_at: float | None = None
    saved_revision: int = 0
    save_again_at: float = 0.0

    def take(self, chunk: Chunk) -> None:
        """Add what an engine's chunk brings."""
        if chunk.text and self.first_text_at is None:
            self.first_text_at = time.monotonic()
        self.content += chunk.text
        self.tokens = chunk.tokens or self.tokens
        self.progress = chunk.progress
        self.usage = chunk.usage or self.usage
        self.note = chunk.note or self.note
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.revision += 1

    def show(self, progress: Progress) -> None:
        self.progress = progress
        self.revision += 1

    @property
    def tokens_per_second(self) -> float:
        """Speed since the first text, or 0.0 while it cannot be told."""
        if self.first_text_at is None or self.tokens < 2:
            return 0.0
        return (self.tokens - 1) / max(time.monotonic() - self.first_text_at, 1e-3)


class FairQueue:
    """Jobs by client, taken in turn: who sends ten messages does not make the others wait for ten."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._changed = threading.Condition(threading.RLock())
        self._closed = False

    def put(self, job: Job) -> None:
        """Add a job. Raises Busy when the queue, or this client's part of it, is full."""
        with self._changed:
            self.check(job.client)
            self._waiting.setdefault(job.client, deque()).append(job)
            self._changed.notify_all()

    def check(self, client: str) -> None:
        """Raise Busy now where `put` would."""
        with self._changed:
            if sum(map(len, self._waiting.values())) >= MAX_WAITING:
                raise Busy("queue_full", limit=MAX_WAITING)
            if len(self._waiting.get(client, ())) >= MAX_PER_CLIENT:
                raise Busy("client_queue_full", limit=MAX_PER_CLIENT)

    def take(self) -> Job | None:
        """The next job, waiting for one; None once the queue is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            client, jobs = self._waiting.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self._waiting[client] = jobs  # to the end of the line
            return job

    def remove(self, job: Job) -> bool:
        """Take a waiting job out; False where it is not waiting any more."""
        with self._changed:
            jobs = self._waiting.get(job.client)
            if not jobs or job not in jobs:
                return False
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.client]
            return True

    def place(self, job: Job) -> int:
        """How many waiting jobs come before this one, counted turn by turn; 0 when it is next."""
        with self._changed:
            lines = [list(jobs) for jobs in self._waiting.values()]
        order = [line[turn] for turn in range(MAX_PER_CLIENT) for line in lines if turn < len(line)]
        return order.index(job) if job in order else 0

    def close(self) -> list[Job]:
        """Wake the taker for good; gives back what was still waiting."""
        with self._changed:
            self._closed = True
            left = [job for jobs in self._waiting.values() for job in jobs]
            self._waiting.clear()
            self._changed.notify_all()
            return left
