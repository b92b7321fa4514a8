"""The data folder and what lies in it: rights, place, settings, conversations, backups, leftovers."""

from __future__ import annotations

import os
import re
import stat
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from glmui.doctor.finding import Finding, ok, problem, warning
from glmui.doctor.world import World
from glmui.errors import StoreError
from glmui.settings import make_data_folder

OLD_SECONDS = 7 * 86400.0  # a half download that nobody has touched for so long is a leftover
_LONG = {"win32": 150}  # characters: Windows ends paths at 260, and models lie some folders deeper
_LONG_ELSEWHERE = 800
_REMOTE = re.compile(r"remote|nfs|cifs|smb|afp|webdav|davfs|9p|fuse\.(sshfs|s3fs|rclone)", re.I)
_SYNCED = re.compile(r"OneDrive|Dropbox|Google ?Drive|Mobile Documents|Nextcloud|Nutstore|坚果云", re.I)


def data_folder(world: World) -> Iterator[Finding]:
    """Whether the folder is there, this account's, writable, and closed to others."""
    folder = world.data_dir
    if not folder.exists():
        yield warning("data_folder", "data_missing", lambda: make_data_folder(folder), folder=folder)
    elif not folder.is_dir():
        yield problem("data_folder", "data_no_folder", folder=folder)
    elif world.platform != "win32" and folder.stat().st_uid != os.getuid():
        yield problem("data_folder", "data_foreign", folder=folder, owner=_owner(folder))
    elif not _writable(folder):
        yield problem("data_folder", "data_unwritable", lambda: make_data_folder(folder), folder=folder)
    elif world.platform != "win32" and (open_to := stat.S_IMODE(folder.stat().st_mode) & 0o077):
        rights = f"{0o700 | open_to:o}"
        yield warning("data_folder", "data_open", lambda: folder.chmod(0o700), folder=folder, rights=rights)
    else:
        yield ok("data_folder", "data_fine", folder=folder)


def _owner(folder: Path) -> str:
    try:
        return folder.owner()
    except (KeyError, NotImplementedError):
        return str(folder.stat().st_uid)


def _writable(folder: Path) -> bool:
    probe = folder / f".probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def data_place(world: World) -> Iterator[Finding]:
    """A database on a network drive, or in a folder that is synchronised, gets damaged sooner or later."""
    folder = world.data_dir
    kind = "remote" if str(folder).startswith("\\\\") else world.filesystem_of(folder)
    synced = _SYNCED.search(str(folder))
    if _REMOTE.match(kind):
        yield warning("data_place", "place_remote", folder=folder, kind=kind)
    elif synced:
        yield warning("data_place", "place_synced", folder=folder, service=synced.group())
    elif len(str(folder)) > _LONG.get(world.platform, _LONG_ELSEWHERE):
        yield warning("data_place", "place_long", folder=folder, count=len(str(folder)))
    else:
        yield ok("data_place", "place_fine", kind=kind or "?")


def settings_file(world: World) -> Iterator[Finding]:
    file = world.data_dir / "settings.toml"
    if world.settings_error:
        mend = (lambda: _set_aside(file)) if _is_damaged(file) else None
        yield problem("settings_file", "settings_wrong", mend, error=world.settings_error, file=file.name)
    else:
        yield ok("settings_file", "settings_fine" if file.is_file() else "settings_none")


def _is_damaged(file: Path) -> bool:
    """Whether nothing can be read in it, so that no single entry is to be put right."""
    try:
        tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError:  # no UTF-8, or no TOML
        return True
    except OSError:
        return False
    return False


def _set_aside(file: Path) -> None:
    """Rename it to settings.toml.broken, or .broken-2 …: an earlier one stays."""
    numbers = ["", *(f"-{n}" for n in range(2, 1000))]
    names = (file.with_name(f"{file.name}.broken{number}") for number in numbers)
    file.rename(next(name for name in names if not name.exists()))


def database(world: World) -> Iterator[Finding]:
    """SQLite's own quick check, read only; the running app is not disturbed."""
    from glmui.store.backups import examine
    from glmui.store.opening import FILE

    file = world.data_dir / FILE
    if not file.is_file():
        yield ok("database", "database_none")
        return
    try:
        trouble = examine(file)
    except StoreError as error:
        yield problem("database", "database_unreadable", error=error)
        return
    if trouble:
        yield problem("database", "database_damaged", trouble=trouble)
    else:
        yield ok("database", "database_fine", count=_conversations(file))


def _conversations(file: Path) -> int:
    from glmui.store.database import connect

    with closing(connect(file, "ro")) as connection:
        return int(connection.execute("SELECT count(*) FROM conversations").fetchone()[0])


def backups(world: World) -> Iterator[Finding]:
    from glmui.store.backups import Backups, made_at
    from glmui.store.opening import FILE

    file = world.data_dir / FILE
    kept = Backups(file).newest_first()
    if kept:
        when = time.strftime("%Y-%m-%d", time.localtime(made_at(kept[0])))
        yield ok("backups", "backups_fine", count=len(kept), when=when)
    elif file.is_file() and _conversations(file):
        yield warning("backups", "backups_none")
    else:
        yield ok("backups", "backups_not_yet")


def leftovers(world: World) -> Iterator[Finding]:
    """Downloads that were broken off and not gone on with."""
    folder = world.data_dir / "downloads"
    old = [path for path in _entries(folder) if world.now - _touched(path) > OLD_SECONDS]
    if not old:
        yield ok("leftovers", "leftovers_none")
        return
    size = sum(file.stat().st_size for path in old for file in _files(path))
    names = ", ".join(path.name for path in old)
    trash = world.data_dir / "trash" / "downloads"
    values = {"names": names, "size": _worded(size), "trash": trash}
    yield warning("leftovers", "leftovers_old", lambda: _move(old, trash), **values)


def _worded(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _touched(path: Path) -> float:
    return max(file.stat().st_mtime for file in (path, *_files(path)))


def _move(paths: list[Path], trash: Path) -> None:
    """Into the trash of the data folder, each under a name that is free."""
    trash.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in paths:
        path.rename(trash / f"{path.name}-{time.time_ns()}")
