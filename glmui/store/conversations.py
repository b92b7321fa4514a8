"""The store: every conversation and message, safe on the disk when a method returns."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from glmui.errors import InvalidInput, NotFound
from glmui.store import records, rows, search
from glmui.store.opening import OpenFolder
from glmui.store.records import Conversation, ErrorValues, Notice, ReplyState, StoredMessage, clean
from glmui.types import FinishReason, Usage


class Store:
    """Conversations in the data folder. Methods may be called from any thread; each blocks for its disk work.

    Every method may raise StoreError (disk_full, database_locked, database_damaged …), after which
    the database stands as before the call and the call may be made again; an unknown or, where
    something is to be added, deleted conversation raises NotFound.
    """

    def __init__(self, opened: OpenFolder) -> None:
        self._opened = opened
        self._database = opened.database

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Open the data folder, which is made where it is missing, for this process alone.

        Replies that were being written when the last app ended become "interrupted". `notice`
        tells what had to be done. Raises StoreError: database_in_use (pid), data_folder_unwritable,
        disk_full, database_locked, database_error.
        """
        return cls(OpenFolder(folder))

    @property
    def notice(self) -> Notice | None:
        """What the reader must be told about the database as it was found."""
        return self._opened.notice

    @property
    def read_only(self) -> bool:
        """Whether a newer glmui made this database, so that it is only shown."""
        return self._database.read_only

    def close(self) -> None:
        self._opened.close()

    # Conversations

    def create_conversation(self, settings: dict[str, Any] | None = None, title: str = "") -> Conversation:
        """A new, empty conversation. Without a title it gets one from its first message."""
        title = rows.given_title(title) if title else ""
        identity, now = uuid.uuid4().hex, time.time()
        with self._database.writing() as connection:
            cursor = connection.execute(
                "INSERT INTO conversations (id, title, auto_title, created_at, updated_at, settings)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (identity, title, not title, now, now, records.dump(settings or {})),
            )
            search.change(connection, "title_search", new=[(cursor.lastrowid or 0, title)])
            return rows.conversation(connection, identity)

    def conversations(self, query: str = "", limit: int = 500, deleted: bool = False) -> list[Conversation]:
        """Conversations, the one written to last first; with `deleted` those in the trash instead.

        query: every piece of it (between blanks) must stand in the title or in a message, anywhere.
        Upper and lower case are one. Nothing in it is an operator.
        """
        held, parameters = search.condition(clean(query))
        with self._database.reading() as connection:
            found = connection.execute(
                f"{records.CONVERSATIONS} WHERE (deleted_at IS NOT NULL) = ? AND {held}"
                " ORDER BY updated_at DESC, number DESC LIMIT ?",
                (deleted, *parameters, limit),
            ).fetchall()
        return [records.conversation(row) for row in found]

    def get_conversation(self, conversation_id: str) -> Conversation:
        """One conversation, one in the trash too."""
        with self._database.reading() as connection:
            return rows.conversation(connection, conversation_id)

    def rename(self, conversation_id: str, title: str) -> None:
        """Raises InvalidInput (empty_title)."""
        with self._database.writing() as connection:
            rows.set_title(
                connection,
                rows.conversation(connection, conversation_id),
                rows.given_title(title),
                auto=False,
            )

    def set_settings(self, conversation_id: str, settings: dict[str, Any]) -> None:
        """Replace the settings of one conversation: plain JSON values."""
        self._set(conversation_id, "settings", records.dump(settings))

    def delete(self, conversation_id: str) -> None:
        """Put a conversation into the trash, from which `restore` brings it back."""
        self._set(conversation_id, "deleted_at", time.time())

    def restore(self, conversation_id: str) -> None:
        self._set(conversation_id, "deleted_at", None)

    def purge(self, deleted_before: float) -> int:
        """Really delete what was put into the trash before that time. Returns how many conversations."""
        with self._database.writing() as connection:
            gone = connection.execute(
                "SELECT id FROM conversations WHERE deleted_at < ?", (deleted_before,)
            ).fetchall()
            for (identity,) in gone:
                rows.purge(connection, identity)
        return len(gone)

    def _set(self, conversation_id: str, column: str, value: Any) -> None:
        with self._database.writing() as connection:
            identity = rows.conversation(connection, conversation_id).id
            connection.execute(f"UPDATE conversations SET {column} = ? WHERE id = ?", (value, identity))

    # Messages

    def thread(self, conversation_id: str, newest: int | None = None) -> list[StoredMessage]:
        """The branch being read, from the first message (or the first of so many newest) to the head."""
        with self._database.reading() as connection:
            identity = rows.conversation(connection, conversation_id).id
            line = connection.execute(records.THREAD, (identity, -1 if newest is None else newest)).fetchall()
        return [records.message(row) for row in line]

    def get_message(self, message_id: int) -> StoredMessage:
        with self._database.reading() as connection:
            return rows.message(connection, message_id)

    def versions(self, message_id: int) -> list[int]:
        """The ids of this message and its siblings of the same role, oldest first."""
        with self._database.reading() as connection:
            message = rows.message(connection, message_id)
            found = connection.execute(
                "SELECT id FROM messages"
                " WHERE conversation_id = ? AND parent_id IS ? AND role = ? ORDER BY id",
                (message.conversation_id, message.parent_id, message.role),
            ).fetchall()
        return [row["id"] for row in found]

    def begin_round(self, conversation_id: str, text: str, model: str) -> tuple[StoredMessage, StoredMessage]:
        """The user's message under the head, and an empty reply under it that is the new head."""
        text = clean(text)
        with self._database.writing() as connection:
            conversation = rows.live_conversation(connection, conversation_id)
            question = rows.insert(connection, conversation.id, conversation.head_id, "user", text)
            search.change(connection, "message_search", new=[(question, text)])
            if conversation.auto_title and not conversation.title:
                rows.set_title(connection, conversation, records.title_from(text), auto=True)
            reply = rows.insert_reply(connection, conversation.id, question, model)
            round_ = rows.message(connection, question), rows.message(connection, reply)
        self._opened.note_newest(reply)
        return round_

    def begin_reply(self, conversation_id: str, parent_id: int, model: str) -> StoredMessage:
        """One more, empty reply to the user's message `parent_id`; earlier ones stay as its siblings."""
        with self._database.writing() as connection:
            conversation = rows.live_conversation(connection, conversation_id)
            parent = rows.message(connection, parent_id)
            if parent.conversation_id != conversation.id or parent.role != "user":
                raise NotFound("message_not_found", message=parent_id)
            reply = rows.message(connection, rows.insert_reply(connection, conversation.id, parent.id, model))
        self._opened.note_newest(reply.id)
        return reply

    def resume_reply(self, message_id: int) -> StoredMessage:
        """Let an ended reply grow on from what it holds. Raises InvalidInput (reply_is_streaming)."""
        with self._database.writing() as connection:
            reply = rows.message(connection, message_id)
            if reply.role != "assistant":
                raise NotFound("message_not_found", message=message_id)
            if reply.state == "streaming":
                raise InvalidInput("reply_is_streaming")
            connection.execute(
                "UPDATE messages SET state = 'streaming', finish_reason = NULL, error = NULL, note = ''"
                " WHERE id = ?",
                (reply.id,),
            )
            search.change(connection, "message_search", old=[(reply.id, reply.content)])
            return rows.message(connection, reply.id)

    def grow_reply(self, message_id: int, content: str) -> None:
        """Save the whole text of a streaming reply so far. One that has ended stays as it ended."""
        with self._database.writing() as connection:
            done = connection.execute(
                "UPDATE messages SET content = ? WHERE id = ? AND state = 'streaming'",
                (clean(content), rows.fits(message_id)),
            )
            if done.rowcount == 0:
                rows.message(connection, message_id)

    def finish_reply(
        self,
        message_id: int,
        content: str,
        state: ReplyState,
        finish_reason: FinishReason | None,
        usage: Usage | None = None,
        note: str = "",
        error: ErrorValues | None = None,
        left_out: int = 0,
    ) -> None:
        """End a streaming reply with its whole text. One that has ended stays as it ended."""
        content = clean(content)
        with self._database.writing() as connection:
            reply = rows.message(connection, message_id)
            if reply.state != "streaming":
                return
            connection.execute(
                "UPDATE messages SET content = ?, state = ?, finish_reason = ?, usage = ?, note = ?,"
                " error = ?, left_out = ? WHERE id = ?",
                (
                    content,
                    state,
                    finish_reason,
                    records.dump_usage(usage),
                    note,
                    records.dump(error) if error else None,
                    left_out,
                    reply.id,
                ),
            )
            search.change(connection, "message_search", new=[(reply.id, content)])
            rows.touch(connection, reply.conversation_id)

    def select_version(self, conversation_id: str, message_id: int) -> None:
        """Read the branch through this message, down to what was last written under it."""
        with self._database.writing() as connection:
            conversation = rows.conversation(connection, conversation_id)
            message = rows.message(connection, message_id)
            if message.conversation_id != conversation.id:
                raise NotFound("message_not_found", message=message_id)
            (head,) = connection.execute(records.NEWEST_BELOW, (message.id,)).fetchone()
            connection.execute("UPDATE conversations SET head_id = ? WHERE id = ?", (head, conversation.id))
