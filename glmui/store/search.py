"""Search that finds what is typed wherever it stands: an FTS5 index over character bigrams.

SQLite's own tokenizers find no Chinese word inside a sentence. So every run of letters becomes its
overlapping pairs (清华大学 -> 清华 华大 大学 学, GLM -> gl lm m), and a piece of a query a phrase of the
same terms: 大学 and even 学 (any term that begins with it) are found, and "glm" in ChatGLM.

The index keeps no copy of the text (content=''). To take an entry out, the same text must be
given again, so whoever changes `terms` adds a migration that calls `rebuild`.
"""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Iterable
from typing import Literal

from glmui.store.database import primary_code

Index = Literal["message_search", "title_search"]
Entry = tuple[int, str]  # row number, text

_INDEXES: tuple[Index, Index] = ("message_search", "title_search")
_PIECES_MOST = 16  # of a query; more narrow nothing down
_RUN = re.compile(r"[^\W_]+")


def normal(text: str) -> str:
    """One form for all ways to write a character: full width, composed or not, upper or lower case."""
    return unicodedata.normalize("NFKC", text).casefold()


def terms(text: str) -> str:
    """What the index holds of a text, blanks between."""
    return " ".join(pair for run in _RUN.findall(normal(text)) for pair in _pairs(run))


def _pairs(run: str) -> list[str]:
    return [run[i : i + 2] for i in range(len(run))]


def phrase(piece: str) -> str | None:
    """The FTS5 phrase that finds `piece` (no blanks), or None where it holds no letter at all."""
    piece = normal(piece)
    runs = list(_RUN.finditer(piece))
    if not runs:
        return None
    found = [pair for run in runs for pair in _pairs(run.group())]
    if runs[-1].end() < len(piece):
        return f'"{" ".join(found)}"'
    # The text may go on where the piece ends: its last letter need not be the last of a run.
    alone = len(runs[-1].group()) == 1
    return f'"{" ".join(found)}" *' if alone else f'"{" ".join(found[:-1])}"'


def condition(query: str) -> tuple[str, list[str]]:
    """SQL for "conversations.id is one that holds every piece of `query`", and its parameters.

    Nothing in a query is an operator. Each piece may stand in the title or in any message.
    """
    clauses, parameters = ["1"], []
    for piece in query.split()[:_PIECES_MOST]:
        wanted = phrase(piece)
        clauses.append(f"conversations.id IN ({_BY_SCAN if wanted is None else _BY_INDEX})")
        parameters += [piece if wanted is None else wanted] * 2
    return " AND ".join(clauses), parameters


_BY_INDEX = """
    SELECT conversation_id FROM messages
    WHERE id IN (SELECT rowid FROM message_search WHERE message_search MATCH ?)
    UNION SELECT id FROM conversations
    WHERE number IN (SELECT rowid FROM title_search WHERE title_search MATCH ?)
"""
# Signs alone (an emoji, "++") are in no index.
_BY_SCAN = """
    SELECT conversation_id FROM messages WHERE state <> 'streaming' AND instr(content, ?)
    UNION SELECT id FROM conversations WHERE instr(title, ?)
"""


def change(
    connection: sqlite3.Connection, index: Index, old: Iterable[Entry] = (), new: Iterable[Entry] = ()
) -> None:
    """Take entries out, with the texts they were made of, and put others in.

    Called when the rows themselves have been changed: an index that turns out to be damaged is
    made anew from them.
    """
    try:
        for number, text in old:
            connection.execute(
                f"INSERT INTO {index}({index}, rowid, terms) VALUES ('delete', ?, ?)", (number, terms(text))
            )
        _add(connection, index, new)
    except sqlite3.DatabaseError as error:
        if primary_code(error) != sqlite3.SQLITE_CORRUPT:
            raise
        rebuild(connection)


def _add(connection: sqlite3.Connection, index: Index, entries: Iterable[Entry]) -> None:
    for number, text in entries:
        connection.execute(f"INSERT INTO {index}(rowid, terms) VALUES (?, ?)", (number, terms(text)))


def is_sound(connection: sqlite3.Connection) -> bool:
    """Whether both indexes can be read to the end."""
    try:
        for index in _INDEXES:
            connection.execute(f"INSERT INTO {index}({index}) VALUES ('integrity-check')")
    except sqlite3.DatabaseError:
        return False
    return True


def rebuild(connection: sqlite3.Connection) -> None:
    """Make both indexes anew from every title and every message that is not being written."""
    for index in _INDEXES:
        _drop(connection, index)
        # Our terms are finished: the plain tokenizer splits at blanks, whatever Unicode it knows.
        connection.execute(
            f"CREATE VIRTUAL TABLE {index} USING fts5(terms, content='', columnsize=0, tokenize='ascii')"
        )
    titles = connection.execute("SELECT number, title FROM conversations")
    _add(connection, "title_search", map(tuple, titles))
    finished = connection.execute("SELECT id, content FROM messages WHERE state <> 'streaming'")
    _add(connection, "message_search", map(tuple, finished))


def _drop(connection: sqlite3.Connection, index: Index) -> None:
    try:
        connection.execute(f"DROP TABLE IF EXISTS {index}")
    except sqlite3.DatabaseError:  # too damaged to be opened, which dropping would do first
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute("DELETE FROM sqlite_schema WHERE name = ?", (index,))
        connection.execute("PRAGMA writable_schema=RESET")
        for part in ("data", "idx", "config", "docsize"):
            connection.execute(f"DROP TABLE IF EXISTS {index}_{part}")
