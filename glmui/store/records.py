"""Conversations and messages as plain values, and how rows become them."""

from __future__ import annotations

import json
import re
import sqlite3
import unicodedata
from dataclasses import asdict, dataclass
from typing import Any, Literal

from glmui import i18n
from glmui.types import FinishReason, Role, Usage

ReplyState = Literal["streaming", "done", "stopped", "interrupted", "error"]
ErrorValues = tuple[str, str, dict[str, Any]]  # what errors.to_values gives

TITLE_LENGTH = 40  # characters of a title made from the first message


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation. Times are seconds since 1970; `deleted_at` is set while it lies in the trash.

    id: 32 hex digits. auto_title: the title comes, or will come, from the first message.
    settings: plain JSON values of the user's choices. head_id: the newest message of the branch being read.
    """

    id: str
    title: str
    auto_title: bool
    created_at: float
    updated_at: float
    deleted_at: float | None
    settings: dict[str, Any]
    head_id: int | None


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """One message as stored.

    left_out: how many rounds the prompt had no room for. note: see notes.py; "" for none.
    version, versions: its place (from 1) among the siblings of its parent and role, and their number.
    """

    id: int
    conversation_id: str
    parent_id: int | None
    role: Role
    content: str
    state: ReplyState
    finish_reason: FinishReason | None
    error: ErrorValues | None
    note: str
    left_out: int
    usage: Usage | None
    model: str
    created_at: float
    version: int
    versions: int


@dataclass(frozen=True, slots=True)
class Notice:
    """What the reader must know about the database; the sentence stands under "notices" in the locales."""

    code: str
    values: dict[str, Any]

    def message(self, language: str = "en") -> str:
        """The sentence in `language` ("en" or "zh")."""
        return i18n.text(language, f"notices.{self.code}", **self.values)


CONVERSATIONS = """
    SELECT id, title, auto_title, created_at, updated_at, deleted_at, settings, head_id FROM conversations
"""

_MESSAGE = """
    SELECT m.id, m.conversation_id, m.parent_id, m.role, m.content, m.state, m.finish_reason, m.error, m.note,
        m.left_out, m.usage, m.model, m.created_at, {version} AS version, {versions} AS versions
    FROM messages AS m
"""
_SIBLINGS = """
    (SELECT count(*) FROM messages AS s
     WHERE s.conversation_id = m.conversation_id AND s.parent_id IS m.parent_id AND s.role = m.role{older})
"""
MESSAGES = _MESSAGE.format(
    version=_SIBLINGS.format(older=" AND s.id <= m.id"), versions=_SIBLINGS.format(older="")
)

# From the head up to the root. Parents are older, so even a damaged file cannot make this a circle.
THREAD = f"""
    WITH RECURSIVE line (message_id, parent_id) AS (
        SELECT messages.id, messages.parent_id FROM conversations JOIN messages ON messages.id = head_id
        WHERE conversations.id = ?
        UNION ALL
        SELECT messages.id, messages.parent_id FROM line JOIN messages ON messages.id = line.parent_id
        WHERE messages.id < message_id
        LIMIT ?
    )
    {MESSAGES} JOIN line ON m.id = message_id ORDER BY m.id
"""

# A message and everything below it; its newest member is where that branch was last written.
NEWEST_BELOW = """
    WITH RECURSIVE below (message_id) AS (
        SELECT ?
        UNION ALL
        SELECT messages.id FROM below JOIN messages ON messages.parent_id = message_id
        WHERE messages.id > message_id
    )
    SELECT max(message_id) FROM below
"""


def conversation(row: sqlite3.Row) -> Conversation:
    values = dict(row)
    values["auto_title"] = bool(values["auto_title"])
    values["settings"] = _loaded(values["settings"], dict) or {}
    return Conversation(**values)


def message(row: sqlite3.Row) -> StoredMessage:
    values = dict(row)
    values["error"] = _error(values["error"])
    values["usage"] = _usage(values["usage"])
    return StoredMessage(**values)


def dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def dump_usage(usage: Usage | None) -> str | None:
    return None if usage is None else dump(asdict(usage))


def _error(text: str | None) -> ErrorValues | None:
    match _loaded(text, list):
        case [str(kind), str(code), dict(values)]:
            return kind, code, values
    return None


def _usage(text: str | None) -> Usage | None:
    try:
        return Usage(**_loaded(text, dict)) if text else None
    except TypeError:
        return None


def _loaded(text: str | None, kind: type) -> Any:
    """JSON of the given kind, or None: one damaged byte must not hide a conversation."""
    try:
        value = json.loads(text) if text else None
    except ValueError:
        return None
    return value if isinstance(value, kind) else None


def clean(text: str) -> str:
    """Text that can be stored: halves of surrogate pairs are joined, lone ones become U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


_CONTROLS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


def one_line(text: str) -> str:
    """Text for one line: no line breaks, no control characters, none that turn the direction of writing."""
    return _CONTROLS.sub(" ", text).strip()


# Markdown's headings, quotes, bold and code; not what looks like bold in code, as in 2**3**4 or f(**kw)
_MARKUP = re.compile(r"^(?:#{1,6}|>) +|(?<![0-9A-Za-z_])(\*\*|`)(?=\S)([^*`]+)(?<=[^\s(])\1(?![0-9A-Za-z_])")


def title_from(text: str) -> str:
    """A title from the first line that says something: at most TITLE_LENGTH characters, whole words."""
    line = next((found for raw in text.splitlines() if (found := one_line(raw[:1000]))), "")
    line = _MARKUP.sub(lambda mark: mark[2] or "", line)
    if len(line) <= TITLE_LENGTH:
        return line
    for cut in range(TITLE_LENGTH, TITLE_LENGTH // 2, -1):
        if not _belong_together(line[cut - 1], line[cut]):
            return line[:cut].rstrip()
    return line[:TITLE_LENGTH]


def _belong_together(left: str, right: str) -> bool:
    """Whether a cut between the two would split a word, or what is shown as one character."""
    word = left.isalnum() and right.isalnum() and max(left, right) < "\u2e80"
    mark = unicodedata.category(right).startswith("M") or "\U0001f3fb" <= right <= "\U0001f3ff"
    flag = all("\U0001f1e6" <= c <= "\U0001f1ff" for c in (left, right))
    return word or mark or flag or "\u200d" in (left, right)
