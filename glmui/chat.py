"""ChatService: a message comes in, a reply grows in the database, whoever is looking may follow.

One thread (the runner) takes jobs out of the fair queue and hands them to the engine, one at a time.
Another (the saver) writes what has grown to disk every quarter of a second, so that neither a slow
disk nor a silent engine ever decides how much of a reply is safe. Pages call the quick methods
below from any thread and look at `live` as often as they like.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from glmui import errors, prompts
from glmui.errors import Busy, EngineError, GlmuiError, InvalidInput, ModelError, NotFound, StoreError
from glmui.jobs import FairQueue, Job
from glmui.store import Conversation, ReplyState, Store, StoredMessage
from glmui.types import (
    ChatEngine,
    ChatSettings,
    EngineSpec,
    FinishReason,
    GenerationParams,
    Message,
    Progress,
    TokenCounter,
)

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
MAX_CHARACTERS = 200_000  # of one message: more than any max_length holds


class Engine(ChatEngine, Protocol):
    """An engine whose model can be changed: the client of the engine process."""

    def configure(self, spec: EngineSpec) -> None: ...

    def set_idle_seconds(self, seconds: float) -> None: ...

    def close(self) -> None: ...


class ChatService:
    """Joins engine and store. `resolve` turns settings into the model to use, or None when none is chosen;
    `count` counts tokens as that model does.

    Every public method returns at once (no model work, at most one commit) and raises GlmuiError.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        resolve: Callable[[], EngineSpec | None],
        count: Callable[[EngineSpec], TokenCounter],
    ) -> None:
        self.store = store
        self.engine = engine
        self._resolve = resolve
        self._count = count
        self._queue = FairQueue()
        self._jobs: dict[str, Job] = {}  # by conversation: queued, running, or not yet safe on disk
        self._revisions: dict[str, int] = {}
        self.changes = 0  # grows with every change of any conversation
        self._asking = threading.Lock()  # between "may this be asked?" and the job in the queue
        self._finishing = threading.Lock()  # a job is finished once, whoever does it
        self._closing = threading.Event()
        self._runner = threading.Thread(target=self._run, name="chat-runner", daemon=True)
        self._saver = threading.Thread(target=self._save_growing, name="chat-saver", daemon=True)
        self._runner.start()
        self._saver.start()

    # Asking

    def send(self, conversation_id: str, text: str, client: str = "page") -> StoredMessage:
        """Commit the user's message and an empty reply, queue the reply's job, return the reply."""
        self.check(text, client)
        with self._asking:
            spec = self._ready_for(conversation_id, client)
            _, reply = self.store.begin_round(conversation_id, text, spec.model)
            return self._start(reply, client)

    def check(self, text: str, client: str) -> None:
        """Raise what `send` would raise in an idle conversation."""
        if not text.strip():
            raise InvalidInput("empty_message")
        if len(text) > MAX_CHARACTERS:
            raise InvalidInput("message_too_large", size=len(text), limit=MAX_CHARACTERS)
        self._model()
        self._queue.check(client)

    def regenerate(self, conversation_id: str, client: str = "page") -> StoredMessage:
        """Answer the newest user message once more; the earlier reply stays as another version."""
        with self._asking:
            spec = self._ready_for(conversation_id, client)
            asked = [m for m in self.store.thread(conversation_id, newest=2) if m.role == "user"]
            if not asked:
                raise InvalidInput("nothing_to_regenerate")
            return self._start(self.store.begin_reply(conversation_id, asked[-1].id, spec.model), client)

    def resume(self, reply_id: int, client: str = "page") -> StoredMessage:
        """Go on with a reply that was stopped, interrupted or ended at max_length."""
        with self._asking:
            self._ready_for(self.store.get_message(reply_id).conversation_id, client)
            return self._start(self.store.resume_reply(reply_id), client)

    def _ready_for(self, conversation_id: str, client: str) -> EngineSpec:
        """Everything that can refuse a reply, asked before anything is written."""
        spec = self._model()
        if self.live(conversation_id):
            raise Busy("reply_running")
        self._queue.check(client)
        return spec

    def _model(self) -> EngineSpec:
        spec = self._resolve()
        if spec is None:
            raise ModelError("no_model")
        return spec

    def _start(self, reply: StoredMessage, client: str) -> StoredMessage:
        job = Job(reply.id, reply.conversation_id, client, content=reply.content)
        self._jobs[reply.conversation_id] = job
        self._queue.put(job)
        self._touch(reply.conversation_id)
        return reply

    # Looking

    def live(self, conversation_id: str) -> Job | None:
        """The reply being made in this conversation, or None. Read it, never change it."""
        return self._jobs.get(conversation_id)

    def place(self, job: Job) -> int:
        """How many replies come before this one in the queue."""
        return self._queue.place(job)

    def running(self) -> int:
        """How many replies are queued or being written."""
        return len(self._jobs)

    def revision(self, conversation_id: str) -> int:
        """A number that grows whenever what is saved of this conversation has changed."""
        return self._revisions.get(conversation_id, 0)

    # Stopping

    def stop(self, conversation_id: str) -> None:
        """End this conversation's reply, wherever it stands; what was written of it stays."""
        job = self.live(conversation_id)
        if job is None:
            return
        if self._queue.remove(job):
            job.finish_reason = "cancelled"
            self._finish(job)
        else:
            self.engine.cancel(job.request_id)

    def delete(self, conversation_id: str) -> None:
        """Put the conversation in the trash; a reply it is making is stopped."""
        self.stop(conversation_id)
        self.store.delete(conversation_id)
        self._touch(conversation_id)

    def close(self) -> None:
        """End all work. Replies cut short are marked interrupted and can be continued."""
        self._closing.set()
        waiting = self._queue.close()
        self.engine.close()
        self._runner.join(timeout=2)
        for job in [*waiting, *list(self._jobs.values())]:
            job.finish_reason = job.finish_reason or "interrupted"
            self._finish(job)
        self._saver.join(timeout=1)
        self.store.close()

    # The runner: one reply after the other

    def _run(self) -> None:
        while (job := self._queue.take()) is not None:
            try:
                self._answer(job)
            except GlmuiError as error:
                job.error, job.finish_reason = error, "error"
            except Exception as error:
                log.exception("reply %s failed", job.request_id)
                job.error, job.finish_reason = EngineError("internal", detail=repr(error)), "error"
            if self._closing.is_set() and job.finish_reason in (None, "error"):
                job.error, job.finish_reason = None, "interrupted"
            self._finish(job)

    def _answer(self, job: Job) -> None:
        spec = self._model()
        job.show(Progress("starting"))
        self.engine.configure(spec)
        prompt, params = self._prompt_for(job, spec)
        job.left_out = prompt.left_out
        for chunk in self.engine.stream_chat(prompt.messages, params, job.request_id):
            job.take(chunk)

    def _prompt_for(self, job: Job, spec: EngineSpec) -> tuple[prompts.Prompt, GenerationParams]:
        settings = self.settings_of(job.conversation_id)
        thread = self.store.thread(job.conversation_id)
        messages = [Message(m.role, m.content) for m in thread if m.content or m.role == "user"]
        if settings.system.strip():
            messages.insert(0, Message("system", settings.system.strip()))
        trained = self.engine.info().context_length
        prompt = prompts.fit(
            messages,
            self._count(spec),
            prompts.token_budget(
                settings.params, trained, settings.history_tokens if settings.history == "tokens" else None
            ),
            hard_limit=min(settings.params.max_length, trained or settings.params.max_length) - 1,
            max_rounds=settings.history_rounds if settings.history == "rounds" else None,
        )
        return prompt, settings.params

    # Saving

    def _save_growing(self) -> None:
        while not self._closing.wait(SAVE_SECONDS):
            for job in list(self._jobs.values()):
                if job.save_error and time.monotonic() < job.save_again_at:
                    continue
                if job.finish_reason is not None and job.save_error is not None:
                    self._finish(job)  # the disk refused the end of it: try again
                elif job.first_text_at is not None and job.saved_revision != job.revision:
                    job.saved_revision = job.revision
                    self._guarded(job, partial(self.store.grow_reply, job.reply_id, job.content))

    def _finish(self, job: Job) -> None:
        with self._finishing:
            if self._jobs.get(job.conversation_id) is not job:
                return  # another thread was first
            reason = job.finish_reason or "interrupted"
            state = ENDINGS[reason]
            if reason == "cancelled" and self._closing.is_set():
                state = "interrupted"
            end = partial(
                self.store.finish_reply,
                job.reply_id,
                job.content,
                state,
                reason,
                usage=job.usage,
                note=job.note,
                error=errors.to_values(job.error) if job.error else None,
                left_out=job.left_out,
            )
            if self._guarded(job, end):
                self._touch(job.conversation_id)
                del self._jobs[job.conversation_id]

    def _guarded(self, job: Job, write: Callable[[], None]) -> bool:
        """Write; a disk that refuses is shown on the job, whose text stays in memory until the next try."""
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

    # Conversations and their settings

    def new_conversation(self, settings: ChatSettings) -> Conversation:
        conversation = self.store.create_conversation(settings.to_dict())
        self._touch(conversation.id)
        return conversation

    def rename(self, conversation_id: str, title: str) -> None:
        self.store.rename(conversation_id, title.strip())
        self._touch(conversation_id)

    def restore(self, conversation_id: str) -> None:
        """Take a conversation back out of the trash."""
        self.store.restore(conversation_id)
        self._touch(conversation_id)

    def select_version(self, conversation_id: str, message_id: int) -> None:
        """Read on with another version of a message."""
        if self.live(conversation_id):
            raise Busy("reply_running")
        self.store.select_version(conversation_id, message_id)
        self._touch(conversation_id)

    def settings_of(self, conversation_id: str) -> ChatSettings:
        return ChatSettings.from_dict(self.store.get_conversation(conversation_id).settings)

    def set_settings(self, conversation_id: str, settings: ChatSettings) -> None:
        self.store.set_settings(conversation_id, settings.to_dict())

    def _touch(self, conversation_id: str) -> None:
        self._revisions[conversation_id] = self._revisions.get(conversation_id, 0) + 1
        self.changes += 1
