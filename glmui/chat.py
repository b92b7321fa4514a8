"""ChatService: a message comes in, a reply grows in the database, whoever is looking may follow.

One thread (the runner) takes jobs out of the fair queue and hands them to the engine, one at a time;
saving.py writes to disk what has grown. Pages call the quick methods below from any thread and look at
`live` as often as they like.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol

from glmui.answering import answered
from glmui.errors import Busy, EngineError, GlmuiError, InvalidInput, ModelError
from glmui.jobs import FairQueue, Job
from glmui.outlook import Foresee, Outlook, RoomLeft, Rooms, room_left
from glmui.saving import Saver
from glmui.store import Conversation, Store, StoredMessage
from glmui.types import (
    USUAL,
    ChatEngine,
    ChatSettings,
    EngineSpec,
    Message,
    Once,
    Progress,
    TokenCounter,
)

log = logging.getLogger(__name__)

Again = Literal["regenerate", "resume"]  # what may be asked for without a new message

MAX_CHARACTERS = 200_000  # of one message: more than any max_length holds


class Engine(ChatEngine, Protocol):
    """An engine whose model can be changed: the client of the engine process."""

    def configure(self, spec: EngineSpec) -> None: ...

    def set_idle_seconds(self, seconds: float) -> None: ...

    def close(self) -> None: ...


class ChatService:
    """Joins engine and store. `resolve` turns settings into the model to use, or None when none is chosen;
    `count` counts tokens as that model does; `foresee` tells what memory a model would have room for.

    Every public method returns at once (no model work, at most one commit) and raises GlmuiError.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        resolve: Callable[[], EngineSpec | None],
        count: Callable[[EngineSpec], TokenCounter],
        foresee: Foresee = lambda spec: None,
    ) -> None:
        self.store = store
        self.engine = engine
        self._resolve = resolve
        self._count = count
        self.foresee = foresee
        self._rooms = Rooms(engine, foresee)
        self._left: dict[str, tuple[object, RoomLeft]] = {}  # by conversation: of what it was counted, and it
        self._queue = FairQueue()
        self._revisions: dict[str, int] = {}
        self.changes = 0  # grows with every change of any conversation
        self._asking = threading.Lock()  # between "may this be asked?" and the job in the queue
        self._closing = threading.Event()
        self._saver = Saver(store, self._closing, self._touch)
        self._jobs = self._saver.jobs
        self._runner = threading.Thread(target=self._run, name="chat-runner", daemon=True)
        self._runner.start()

    # Asking

    def send(
        self, conversation_id: str, text: str, client: str = "page", once: Once = USUAL
    ) -> StoredMessage:
        """Commit the user's message and an empty reply, queue the reply's job, return the reply."""
        self.check(text, client)
        with self._asking:
            spec = self._ready_for(conversation_id, client)
            _, reply = self.store.begin_round(conversation_id, text, spec.model)
            return self._start(reply, client, once)

    def check(self, text: str, client: str) -> None:
        """Raise what `send` would raise in an idle conversation."""
        if not text.strip():
            raise InvalidInput("empty_message")
        if len(text) > MAX_CHARACTERS:
            raise InvalidInput("message_too_large", size=len(text), limit=MAX_CHARACTERS)
        self._model()
        self._queue.check(client)

    def regenerate(self, conversation_id: str, client: str = "page", once: Once = USUAL) -> StoredMessage:
        """Answer the newest user message once more; the earlier reply stays as another version."""
        with self._asking:
            spec = self._ready_for(conversation_id, client)
            asked = [m for m in self.store.thread(conversation_id, newest=2) if m.role == "user"]
            if not asked:
                raise InvalidInput("nothing_to_regenerate")
            reply = self.store.begin_reply(conversation_id, asked[-1].id, spec.model)
            return self._start(reply, client, once)

    def resume(self, reply_id: int, client: str = "page", once: Once = USUAL) -> StoredMessage:
        """Go on with a reply that was stopped, interrupted or ended for want of room. Where it has filled the
        room alone, the model sees no more than its end."""
        with self._asking:
            self._ready_for(self.store.get_message(reply_id).conversation_id, client)
            return self._start(self.store.resume_reply(reply_id), client, once)

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

    def _start(self, reply: StoredMessage, client: str, once: Once = USUAL) -> StoredMessage:
        job = Job(reply.id, reply.conversation_id, client, content=reply.content, once=once)
        self._jobs[reply.conversation_id] = job
        self._queue.put(job)
        self._touch(reply.conversation_id)
        return reply

    # Looking ahead

    def outlook(self, conversation_id: str, text: str, settings: ChatSettings) -> Outlook | None:
        """Whether memory has room for this message, and what would help; None where memory sets no bound.

        conversation_id: "" for a new one. Raises InvalidInput where max_length does not hold the message.
        """
        said = self._said(conversation_id) if conversation_id else []
        return self._outlook([*said, Message("user", text)], settings)

    def outlook_again(self, conversation_id: str, wish: Again) -> Outlook | None:
        """The same for the newest message's next answer, or for the last reply's going on."""
        said = self._said(conversation_id)
        while wish == "regenerate" and said and said[-1].role != "user":
            said.pop()
        return self._outlook(said, self.settings_of(conversation_id))

    def _outlook(self, messages: list[Message], settings: ChatSettings) -> Outlook | None:
        spec = self._model()
        limits = self._rooms.limits(spec)
        if not 0 < limits.room < limits.length(settings.params):
            return None
        return self._rooms.outlook(messages, settings, spec, self._count(spec))

    def holds(self, spec: EngineSpec) -> bool:
        """Whether the engine is ready with just what this spec asks for."""
        return self._rooms.holds(spec)

    def room_left(self, conversation_id: str) -> RoomLeft | None:
        """What the conversation leaves for its next message; None where that cannot be told.

        Counted anew where something has changed since it was last asked, so that it may be asked often.
        """
        with suppress(GlmuiError):
            spec, settings = self._model(), self.settings_of(conversation_id)
            limits = self._rooms.limits(spec).within(settings.params)
            counted = (self.revision(conversation_id), settings, spec, limits)
            if conversation_id not in self._left or self._left[conversation_id][0] != counted:
                said = self._said(conversation_id)
                self._left[conversation_id] = counted, room_left(said, settings, self._count(spec), limits)
            return self._left[conversation_id][1]
        return None

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
            self._saver.finish(job)
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
            self._saver.finish(job)
        self._saver.join()
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
            self._saver.finish(job)

    def _answer(self, job: Job) -> None:
        spec = self._model()
        if job.once.device:
            spec = replace(spec, device=job.once.device)
        job.show(Progress("starting"))
        self.engine.configure(spec)
        self._rooms.configured(spec)
        said, settings = self._said(job.conversation_id), self._settings_for(job)
        limits = partial(self._rooms.limits, spec)
        for prompt, chunk in answered(said, settings, self.engine, self._count(spec), limits, job.request_id):
            job.left_out = prompt.left_out
            job.take(chunk)

    def _settings_for(self, job: Job) -> ChatSettings:
        settings = self.settings_of(job.conversation_id)
        if not job.once.max_new_tokens:
            return settings
        return replace(settings, params=replace(settings.params, max_new_tokens=job.once.max_new_tokens))

    def _said(self, conversation_id: str) -> list[Message]:
        """The conversation as a model is shown it: without replies of which nothing came."""
        thread = self.store.thread(conversation_id)
        return [Message(m.role, m.content) for m in thread if m.content or m.role == "user"]

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
