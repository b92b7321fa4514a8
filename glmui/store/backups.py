"""Backups of the database: once a day and before every migration, the seven newest kept."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from contextlib import closing
from datetime import datetime
from pathlib import Path

from glmui.durable import settle
from glmui.errors import StoreError
from glmui.store import records
from glmui.store.database import Database, connect, primary_code, told
from glmui.store.migrations import MIGRATIONS, version
from glmui.workshop import workshop

KEPT = 7
_DAY = 24 * 3600.0
_LOOK_EVERY = 3600.0  # seconds between two looks whether the day's backup is due
_STAMP = "%Y%m%d-%H%M%S"
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
_PROBES = (f"{records.CONVERSATIONS} LIMIT 1", f"{records.MESSAGES} LIMIT 1")

_log = logging.getLogger(__name__)


class Backups:
    """The folder `backups` beside a database file. Raises StoreError where the disk refuses."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.folder = file.parent / "backups"

    def newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("glmui-*.db"), reverse=True)

    def due(self) -> bool:
        """Whether the newest backup is older than a day (or bears a time that is still to come)."""
        newest = self.newest_first()[:1]
        age = time.time() - made_at(newest[0]) if newest else _DAY
        return not 0 <= age < _DAY

    def make(self, stop: threading.Event | None = None) -> Path:
        """Copy the database as it is now, check the copy, and let the oldest one go.

        Writers go on meanwhile. `stop` ends it early.
        """
        with told(self.file.parent):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with workshop(self.folder, "making-") as shop:
                draft = blank(shop / "new.db")
                _copy_pages(self.file, draft, stop)
                if problem := examine(draft, at_rest=True):
                    raise StoreError("database_damaged", folder=self.file.parent, detail=problem)
                return self._keep(draft)

    def newest_good(self) -> Path | None:
        return next((b for b in self.newest_first() if not examine(b, at_rest=True)), None)

    def _keep(self, draft: Path) -> Path:
        kept = self.folder / f"glmui-{datetime.now().strftime(_STAMP)}.db"
        settle(draft, kept)
        for old in self.newest_first()[KEPT:]:
            old.unlink(missing_ok=True)
        return kept


class DailyBackups:
    """A thread that makes the day's backup: soon after the start, and while the app runs on."""

    def __init__(self, backups: Backups, database: Database) -> None:
        self._backups = backups
        self._database = database
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="glmui-backups", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if self._backups.due() and self._any_message():
                    self._database.checkpoint()  # no backup may hold more than the file: see rescue
                    self._backups.make(self._stop)
            except _Stopped:
                return
            except StoreError as error:
                _log.warning("no backup of the conversations could be made: %s", error)
            self._stop.wait(_LOOK_EVERY)

    def _any_message(self) -> bool:
        with self._database.reading() as connection:
            return connection.execute("SELECT 1 FROM messages LIMIT 1").fetchone() is not None


def made_at(backup: Path) -> float:
    """When a backup was made, seconds since 1970; 0 for a name that does not tell."""
    try:
        return datetime.strptime(backup.stem.removeprefix("glmui-"), _STAMP).timestamp()
    except ValueError:
        return 0.0


def examine(file: Path, *, at_rest: bool = False) -> str:
    """What is wrong with a database file, or "". The file and its write-ahead log stay as they are.

    at_rest: a backup, which nobody writes to. Raises StoreError when the file cannot be read at all.
    """
    with told(file.parent):
        with file.open("rb") as opened:
            header = opened.read(100)
        if header[:16] != b"SQLite format 3\0" or header[18:20] not in (b"\1\1", b"\2\2"):
            return "not a database" if header else "an empty file"
        # A rollback journal (of a backup put in place by hand) must be written back to read the file.
        mode = "rw" if journal(file).exists() else "ro"
        try:
            with closing(connect(file, mode, immutable=at_rest)) as connection:
                return _problem(connection)
        except UnicodeDecodeError:  # SQLite quotes a damaged name in its own error
            return "names in it are unreadable"
        except sqlite3.DatabaseError as error:
            if primary_code(error) in _DAMAGE:
                return str(error)
            raise


def _problem(connection: sqlite3.Connection) -> str:
    number = version(connection)
    if number == 0:
        return "not a database of glmui"
    findings = [str(row[0]) for row in connection.execute("PRAGMA quick_check")]
    # The search index can be made anew from the messages.
    findings = [text for text in findings if text != "ok" and "FTS5" not in text]
    if not findings and connection.execute("PRAGMA foreign_key_check").fetchone():
        findings = ["a message or conversation is missing"]
    if not findings and number == len(MIGRATIONS):
        for probe in _PROBES:
            connection.execute(probe).fetchall()
    return findings[0] if findings else ""


def blank(file: Path) -> Path:
    """An empty file that only this account may read, in a folder of the same kind. Raises OSError."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for leftover in (file, *beside(file), journal(file)):
        leftover.unlink(missing_ok=True)
    os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    return file


def beside(file: Path) -> tuple[Path, Path]:
    """The write-ahead log and its index, which belong to a database file while it is open."""
    return file.with_name(f"{file.name}-wal"), file.with_name(f"{file.name}-shm")


def journal(file: Path) -> Path:
    """The rollback journal of a file that has no write-ahead log."""
    return file.with_name(f"{file.name}-journal")


class _Stopped(Exception):
    """The app ends while a backup is being made."""


def _copy_pages(source: Path, target: Path, stop: threading.Event | None) -> None:
    def step(_status: int, _remaining: int, _total: int) -> None:
        if stop is not None and stop.is_set():
            raise _Stopped

    with closing(connect(source)) as reader, closing(connect(target)) as writer:
        # A read transaction held all along: what is written meanwhile does not start the copy over.
        reader.execute("BEGIN")
        reader.execute("SELECT 1 FROM sqlite_schema").fetchone()
        reader.backup(writer, pages=1024, progress=step)
        writer.execute("PRAGMA journal_mode=DELETE")  # one file, complete in itself
