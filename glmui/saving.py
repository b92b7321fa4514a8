"""Replies go to disk while they grow, whatever the engine does and however slow the disk is.

One thread writes what is new four times a second. A disk that refuses loses nothing: the text stays in its
job, the page says so, and it is tried again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from glmui import errors
from glmui.errors import GlmuiError, NotFound, StoreError
from glmui.jobs import Job
from glmui.store import ReplyState, Store
from glmui.types import FinishReason

log = logging.getLogger(__name__)

SAVE_SECONDS = 0.25  # what a kill -9 may cost, at most
SAVE_AGAIN_SECONDS = 2.0  # after the disk refused
ENDINGS: dict[FinishReason, ReplyState] = {
    "stop": "done",
    "length": "done",
    "cancelled": "stopped",
    "error": "error",
    "interrupted": "interrupted",
}


class Saver:
    """jobs: by conversation, those that are queued, running, or not yet safe on disk.

    closing: set once the app is about to end. on_finished: told of each conversation whose reply is safe.
    """

    def __init__(self, store: Store, closing: threading.Event, on_finished: Callable[[str], None]) -> None:
        self.jobs: dict[str, Job] = {}
        self._store = store
        self._closing = closing
        self._on_finished = on_finished
        self._finishing = threading.Lock()  # a job is finished once, whoever does it
        self._thread = threading.Thread(target=self._run, name="chat-saver", daemon=True)
        self._thread.start()

    def finish(self, job: Job) -> None:
        """Write a reply's end and let go of its job; where the disk refuses, the thread tries again."""
        with self._finishing:
            if self.jobs.get(job.conversation_id) is not job:
                return  # another thread was first
            reason = job.finish_reason or "interrupted"
            state = ENDINGS[reason]
            if reason == "cancelled" and self._closing.is_set():
                state = "interrupted"
            end = partial(
                self._store.finish_reply,
                job.reply_id,
                job.content,
                state,
                reason,
                usage=job.usage,
                note=job.note,
                error=errors.to_values(job.error) if job.error else None,
                left_out=job.left_out,
            )
            if self._write(job, end):
                self._on_finished(job.conversation_id)
                del self.jobs[job.conversation_id]

    def join(self) -> None:
        """Wait until the thread has ended, after `closing` was set."""
        self._thread.join(timeout=1)

    def _run(self) -> None:
        while not self._closing.wait(SAVE_SECONDS):
            for job in list(self.jobs.values()):
                self._save(job)

    def _save(self, job: Job) -> None:
        if job.save_error and time.monotonic() < job.save_again_at:
            return
        if job.finish_reason is not None and job.save_error is not None:
            self.finish(job)  # the disk refused the end of it: try again
        elif job.first_text_at is not None and job.saved_revision != job.revision:
            job.saved_revision = job.revision
            self._write(job, partial(self._store.grow_reply, job.reply_id, job.content))

    def _write(self, job: Job, write: Callable[[], None]) -> bool:
        """Whether it is written. A disk that refuses is shown on the job."""
        try:
            write()
        except NotFound:
            log.warning("the conversation of a reply is gone")
        except Exception as error:
            if job.save_error is None:
                log.exception("saving a reply failed")
            job.save_error = (
                error if isinstance(error, GlmuiError) else StoreError("database_error", detail=error)
            )
            job.save_again_at = time.monotonic() + SAVE_AGAIN_SECONDS
            job.revision += 1
            return False
        job.save_error = None
        return True
