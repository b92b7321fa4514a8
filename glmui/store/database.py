"""SQLite as this app uses it: one writer behind a lock, readers that cannot write, errors in our words."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glmui.errors import StoreError

_NEARLY_FULL = 1 << 20  # bytes: SQLite says "I/O error" for some of the writes a full disk refuses


def connect(file: Path, mode: str = "rw", *, immutable: bool = False) -> sqlite3.Connection:
    """A connection in autocommit mode with the pragmas every connection gets.

    mode: "rw", or "ro", which leaves the file and its write-ahead log exactly as they are.
    immutable: the file is not in use; no -wal or -shm file is looked for or made.
    """
    uri = f"{file.absolute().as_uri()}?mode={mode}" + ("&immutable=1" if immutable else "")
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=5.0)
    # A byte damaged on disk must not make a whole conversation unreadable.
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    connection.row_factory = sqlite3.Row
    try:
        for pragma in ("foreign_keys=ON", "busy_timeout=5000", "mmap_size=0", "trusted_schema=OFF"):
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


class Database:
    """The open database file. Methods may be called from any thread.

    Everything raised while reading or writing is a GlmuiError: see `told`.
    """

    def __init__(self, file: Path, *, read_only: bool = False) -> None:
        self.file = file
        self.read_only = read_only
        self._lock = threading.RLock()
        self._pool_lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        self._writer: sqlite3.Connection | None = None
        if not read_only:
            with told(file.parent):
                self._writer = _writer(file)

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction on the only writer: all of it is on the disk afterwards, or none."""
        with self._lock, told(self.file.parent):
            if self._closed:
                raise StoreError("database_error", detail="closed")
            if self._writer is None:
                raise StoreError("database_read_only")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                _roll_back(self._writer)
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that can only read. It sees what was committed before each query."""
        with told(self.file.parent):
            connection = self._borrow()
            try:
                yield connection
            finally:
                self._give_back(connection)

    def checkpoint(self) -> None:
        """Move what the write-ahead log holds into the database file, as far as readers allow."""
        with self._lock, told(self.file.parent):
            if self._writer is not None:
                self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self) -> None:
        """End every connection; the last one empties the write-ahead log. May be called twice."""
        with self._lock, self._pool_lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for connection in idle:
                connection.close()
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def _borrow(self) -> sqlite3.Connection:
        with self._pool_lock:
            if self._closed:
                raise StoreError("database_error", detail="closed")
            if self._idle:
                return self._idle.pop()
        connection = connect(self.file)
        connection.execute("PRAGMA query_only=ON")
        return connection

    def _give_back(self, connection: sqlite3.Connection) -> None:
        with self._pool_lock:
            if self._closed:
                connection.close()
            else:
                self._idle.append(connection)


def _writer(file: Path) -> sqlite3.Connection:
    connection = connect(file)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA journal_size_limit={64 << 20}")
    except BaseException:
        connection.close()
        raise
    return connection


def _roll_back(connection: sqlite3.Connection) -> None:
    try:
        if connection.in_transaction:  # a full disk has rolled back already
            connection.execute("ROLLBACK")
    except sqlite3.Error:
        pass  # the first error is the one to tell


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Turn whatever SQLite or the file system raises inside into a StoreError that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise _story(error, folder) from error
    except UnicodeDecodeError as error:  # SQLite quotes a damaged name in its own error
        raise StoreError("database_damaged", folder=folder, detail=error.reason) from error
    except OSError as error:
        raise refused(error, folder) from error


def _story(error: sqlite3.Error, folder: Path) -> StoreError:
    code = primary_code(error)
    full = code == sqlite3.SQLITE_IOERR and _free(folder) < _NEARLY_FULL
    if full or code == sqlite3.SQLITE_FULL:
        return StoreError("disk_full", folder=folder)
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return StoreError("data_folder_unwritable", folder=folder, detail=error)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
        return StoreError("database_locked", folder=folder)
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreError("database_damaged", folder=folder, detail=error)
    return StoreError("database_error", folder=folder, detail=error)


def refused(error: OSError, folder: Path) -> StoreError:
    """What to raise when the file system refuses a file of the data folder."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError("disk_full", folder=folder)
    return StoreError("data_folder_unwritable", folder=folder, detail=error.strerror or error)


def primary_code(error: sqlite3.Error) -> int:
    """SQLite's result code without its extension, or 0 where Python's own module raised."""
    code: Any = getattr(error, "sqlite_errorcode", None)
    return int(code) & 0xFF if code is not None else 0


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return _NEARLY_FULL
