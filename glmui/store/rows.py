"""Single rows: found, added, changed, inside a transaction the caller holds."""

from __future__ import annotations

import sqlite3
import time

from glmui.errors import InvalidInput, NotFound
from glmui.store import records, search
from glmui.store.records import Conversation, ReplyState, StoredMessage, clean
from glmui.types import Role

_TITLE_MOST = 200  # characters of a title given by hand
_LARGEST_ID = 2**63 - 1


def conversation(connection: sqlite3.Connection, conversation_id: str) -> Conversation:
    row = connection.execute(f"{records.CONVERSATIONS} WHERE id = ?", (clean(conversation_id),)).fetchone()
    if row is None:
        raise NotFound("conversation_not_found", conversation=conversation_id)
    return records.conversation(row)


def live_conversation(connection: sqlite3.Connection, conversation_id: str) -> Conversation:
    """One that is not in the trash: nothing is added to those that are."""
    found = conversation(connection, conversation_id)
    if found.deleted_at is not None:
        raise NotFound("conversation_in_trash", title=found.title)
    return found


def message(connection: sqlite3.Connection, message_id: int) -> StoredMessage:
    row = connection.execute(f"{records.MESSAGES} WHERE m.id = ?", (fits(message_id),)).fetchone()
    if row is None:
        raise NotFound("message_not_found", message=message_id)
    return records.message(row)


def fits(message_id: int) -> int:
    """The id, or one that no message has where SQLite could not hold it."""
    return message_id if 0 < message_id <= _LARGEST_ID else 0


def insert(
    connection: sqlite3.Connection,
    conversation_id: str,
    parent_id: int | None,
    role: Role,
    content: str,
    state: ReplyState = "done",
    model: str = "",
) -> int:
    cursor = connection.execute(
        "INSERT INTO messages"
        " (conversation_id, parent_id, role, content, state, model, created_at, note, left_out)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, '', 0)",
        (conversation_id, parent_id, role, content, state, clean(model), time.time()),
    )
    return cursor.lastrowid or 0


def insert_reply(connection: sqlite3.Connection, conversation_id: str, parent_id: int, model: str) -> int:
    """An empty streaming reply, which becomes the head."""
    reply = insert(connection, conversation_id, parent_id, "assistant", "", "streaming", model)
    connection.execute("UPDATE conversations SET head_id = ? WHERE id = ?", (reply, conversation_id))
    touch(connection, conversation_id)
    return reply


def touch(connection: sqlite3.Connection, conversation_id: str) -> None:
    connection.execute("UPDATE conversations SET updated_at = ? WHERE id = ?", (time.time(), conversation_id))


def given_title(text: str) -> str:
    title = records.one_line(clean(text))[:_TITLE_MOST].strip()
    if not title:
        raise InvalidInput("empty_title")
    return title


def set_title(connection: sqlite3.Connection, conversation: Conversation, title: str, *, auto: bool) -> None:
    (number,) = connection.execute(
        "UPDATE conversations SET title = ?, auto_title = ? WHERE id = ? RETURNING number",
        (title, auto, conversation.id),
    ).fetchone()
    search.change(connection, "title_search", [(number, conversation.title)], [(number, title)])


def purge(connection: sqlite3.Connection, conversation_id: str) -> None:
    """Delete a conversation with all its messages, and what the search index knows of them."""
    finished = connection.execute(
        "SELECT id, content FROM messages WHERE conversation_id = ? AND state <> 'streaming'",
        (conversation_id,),
    ).fetchall()
    connection.execute("UPDATE conversations SET head_id = NULL WHERE id = ?", (conversation_id,))
    connection.execute("DELETE FROM messages WHERE conversation_id = ?", (conversation_id,))
    title = connection.execute(
        "DELETE FROM conversations WHERE id = ? RETURNING number, title", (conversation_id,)
    ).fetchone()
    search.change(connection, "message_search", old=map(tuple, finished))
    search.change(connection, "title_search", old=[tuple(title)])
