"""Makes sure that a sound database stands in the data folder before it is opened.

A damaged one is kept aside under a new name and the newest good backup takes its place. Whatever
was done is told: a history never turns empty in silence.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Literal

from glmui.durable import flush, settle
from glmui.store.backups import Backups, beside, blank, examine, made_at
from glmui.store.database import connect, told
from glmui.store.migrations import migrate
from glmui.store.records import Notice

_log = logging.getLogger(__name__)


def make_sound(file: Path, backups: Backups) -> Notice | None:
    """Leave a sound database at `file`: the one found, a backup, or a new one.

    Returns what the reader must be told. Raises StoreError where the disk refuses.
    """
    with told(file.parent):
        if file.exists():
            if problem := examine(file):
                _log.error("the database is damaged: %s", problem)
                return _replace(file, backups, "damaged")
            return None
        if _is_fresh(file, backups):
            _create(file)
            return None
        return _replace(file, backups, "missing")


def _is_fresh(file: Path, backups: Backups) -> bool:
    """Whether no database was ever here. (A file gets its name when it is complete: see `_create`.)"""
    traces = [*beside(file), *file.parent.glob(f"{file.stem}.damaged-*")]
    return not backups.newest_first() and not any(trace.exists() for trace in traces)


def _replace(file: Path, backups: Backups, what: Literal["damaged", "missing"]) -> Notice:
    good = backups.newest_good()  # before anything is moved: this may fail
    kept = _set_aside(file)
    if good is None:
        _create(file)
        return Notice(f"database_{what}_empty", {"kept": kept})
    _restore(good, file)
    when = datetime.fromtimestamp(made_at(good)).strftime("%Y-%m-%d %H:%M")
    return Notice(f"database_{what}_restored", {"kept": kept, "when": when})


def _set_aside(file: Path) -> str:
    """Rename the file and its log together, so that a tool can still read both. Returns the new name."""
    log, index = beside(file)
    kept = _aside(file)
    for old, new in ((log, beside(kept)[0]), (file, kept)):
        if old.exists():
            old.replace(new)
    index.unlink(missing_ok=True)
    return kept.name


def _aside(file: Path) -> Path:
    return file.with_name(f"{file.stem}.damaged-{datetime.now():%Y%m%d-%H%M%S-%f}.db")


def _create(file: Path) -> None:
    """A new, empty database. Built under another name: `file` never stands for half of one.

    It has its write-ahead log from the beginning: a rollback journal left by a kill would have to
    be written back before `examine` could look at the file.
    """
    draft = blank(file.with_name(f"{file.name}.new"))
    with closing(connect(draft)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        migrate(connection)
    settle(draft, file)


def _restore(backup: Path, file: Path) -> None:
    draft = blank(file.with_name(f"{file.name}.new"))
    shutil.copyfile(backup, draft)
    flush(draft)
    with closing(connect(draft)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    settle(draft, file)


def newest_lost(file: Path, backups: Backups, newest: int) -> Notice | None:
    """A notice when the message `newest` was saved once and the database has never heard of it.

    So it is when the write-ahead log is gone or damaged: the database file itself looks sound. What
    is left of the log is copied aside. (Backups are made after a checkpoint, so none holds more.)
    """
    with told(file.parent), closing(connect(file, "ro")) as connection:
        row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'messages'").fetchone()
        lost = newest - (row[0] if row else 0)
        log = beside(file)[0]
        if lost <= 0:
            return None
        if log.exists():
            kept = _aside(file)
            shutil.copyfile(file, blank(kept))
            shutil.copyfile(log, blank(beside(kept)[0]))
    return Notice("newest_messages_lost", {"lost": lost, "folder": backups.folder})
