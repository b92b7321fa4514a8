"""Opens a data folder: lock, rescue, migrations, replies left behind; and closes it again."""

from __future__ import annotations

import logging
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

from glmui.store import search
from glmui.store.backups import Backups, DailyBackups
from glmui.store.database import Database, connect, told
from glmui.store.lock import FolderLock
from glmui.store.migrations import MIGRATIONS, migrate, version
from glmui.store.records import Notice
from glmui.store.rescue import make_sound, newest_lost

FILE = "glmui.db"

_log = logging.getLogger(__name__)


class OpenFolder:
    """The data folder while this app holds it: its lock, its database, its daily backups.

    notice: what the reader must be told about how it was found, or None.
    Raises StoreError: database_in_use, data_folder_unwritable, disk_full, database_locked, database_error.
    """

    def __init__(self, folder: Path) -> None:
        self.notice: Notice | None = None
        self._daily: DailyBackups | None = None
        self._noting = threading.Lock()
        self._closed = False
        with told(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = FolderLock(folder)
            try:
                self.database = self._open(folder / FILE)
            except BaseException:
                self._lock.release()
                raise

    def note_newest(self, message_id: int) -> None:
        """Remember beside the database that this message is in it."""
        with self._noting:
            self._lock.write(max(message_id, self._lock.newest))

    def close(self) -> None:
        """Stop the backups, empty the write-ahead log and let another app in. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._daily is not None:
            self._daily.close()
        self.database.close()
        self._lock.release()

    def _open(self, file: Path) -> Database:
        backups = Backups(file)
        self.notice = make_sound(file, backups)
        file.chmod(0o600)
        with closing(connect(file)) as connection:
            found = version(connection)
        if found > len(MIGRATIONS):
            self._lock.write(self._lock.newest)
            self.notice = self.notice or Notice("database_newer", {"found": found, "known": len(MIGRATIONS)})
            return Database(file, read_only=True)
        self.notice = self.notice or newest_lost(file, backups, self._lock.newest)
        if found < len(MIGRATIONS):
            backups.make()
            with closing(connect(file)) as connection:
                migrate(connection)
        return self._ready(Database(file), backups)

    def _ready(self, database: Database, backups: Backups) -> Database:
        try:
            _mend_search(database)
            with database.writing() as connection:
                _interrupt(connection)
                self._lock.write(_newest(connection))
        except BaseException:
            database.close()
            raise
        self._daily = DailyBackups(backups, database)
        return database


def _newest(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT coalesce(max(id), 0) FROM messages").fetchone()[0])


def _mend_search(database: Database) -> None:
    with database.writing() as connection:
        sound = search.is_sound(connection)
    if not sound:
        _log.warning("the search index is damaged and is made anew")
        with database.writing() as connection:
            search.rebuild(connection)


def _interrupt(connection: sqlite3.Connection) -> None:
    """Replies that were being written when the last app ended: nobody writes them any more."""
    left = connection.execute(
        "UPDATE messages SET state = 'interrupted', finish_reason = 'interrupted' WHERE state = 'streaming'"
        " RETURNING id, content"
    ).fetchall()
    search.change(connection, "message_search", new=map(tuple, left))
