"""The schema, as numbered steps. A released step is never changed; a new one goes to the end.

The table `migrations` remembers which steps a file has had. Each runs in a transaction of its
own, so a file is always at one exact version.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence

from glmui.store import search

Step = Callable[[sqlite3.Connection], None]


def _conversations(connection: sqlite3.Connection) -> None:
    """Messages form a tree: a regenerated reply is a sibling, and `head_id` says which branch is read.

    A parent is always older than its child, so the way from a message to the root must end.
    """
    connection.execute("""
        CREATE TABLE conversations (
            number INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            title TEXT NOT NULL,
            auto_title INTEGER NOT NULL,
            created_at REAL NOT NULL,
            updated_at REAL NOT NULL,
            deleted_at REAL,
            settings TEXT NOT NULL,
            head_id INTEGER REFERENCES messages (id) DEFERRABLE INITIALLY DEFERRED
        ) STRICT""")
    connection.execute("""
        CREATE TABLE messages (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            conversation_id TEXT NOT NULL REFERENCES conversations (id) DEFERRABLE INITIALLY DEFERRED,
            parent_id INTEGER REFERENCES messages (id) DEFERRABLE INITIALLY DEFERRED,
            role TEXT NOT NULL CHECK (role IN ('system', 'user', 'assistant')),
            content TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('streaming', 'done', 'stopped', 'interrupted', 'error')),
            finish_reason TEXT,
            error TEXT,
            note TEXT NOT NULL,
            left_out INTEGER NOT NULL,
            usage TEXT,
            model TEXT NOT NULL,
            created_at REAL NOT NULL,
            CHECK (parent_id < id)
        ) STRICT""")
    connection.execute("CREATE INDEX siblings ON messages (conversation_id, parent_id, role)")
    connection.execute("CREATE INDEX children ON messages (parent_id)")
    connection.execute("CREATE INDEX heads ON conversations (head_id)")
    connection.execute("CREATE INDEX streaming ON messages (id) WHERE state = 'streaming'")


MIGRATIONS: tuple[Step, ...] = (_conversations, search.rebuild)


def version(connection: sqlite3.Connection) -> int:
    """How many steps this file has had; 0 for a blank one or one that is not ours."""
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'migrations'").fetchone():
        return 0
    return int(connection.execute("SELECT coalesce(max(number), 0) FROM migrations").fetchone()[0])


def migrate(connection: sqlite3.Connection, steps: Sequence[Step] = MIGRATIONS) -> None:
    """Take the steps this file has not had. A step that fails leaves the file as it was before it."""
    for number, step in enumerate(steps[version(connection) :], version(connection) + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, at REAL NOT NULL) STRICT"
            )
            step(connection)
            connection.execute("INSERT INTO migrations VALUES (?, ?)", (number, time.time()))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
