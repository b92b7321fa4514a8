"""A damaged database never crashes the app, never turns empty in silence, and is kept aside."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from glmui.store import Store
from glmui.store.backups import Backups

ROOT = Path(__file__).resolve().parent.parent
LEAVE_BEHIND = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from glmui.store import Store
store = Store.open(Path(sys.argv[2]))
conversation = store.create_conversation()
for number in range(3):
    store.begin_round(conversation.id, f"question {number}", "m")
os._exit(9)
"""

DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("<html>404</html>" * 1000),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one byte": lambda file: file.write_bytes(b"S"),
    "header": lambda file: patch(file, 0, b"\xff" * 16),
    "middle": lambda file: patch(file, 4096, b"\xa5" * 4096),
    "page size": lambda file: patch(file, 16, b"\x00\x03"),
    "schema": lambda file: patch(file, 200, b"\xa5" * 3000),
    "another program's": lambda file: another(file),
}


def patch(file: Path, offset: int, noise: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(noise)


def flip_the_middle(file: Path) -> None:
    middle = file.stat().st_size // 2
    patch(file, middle, bytes([file.read_bytes()[middle] ^ 0xFF]))


def another(file: Path) -> None:
    file.unlink()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE bookmarks (url)")


def filled(folder: Path, text: str = "清华大学") -> None:
    store = Store.open(folder)
    for number in range(5):
        _, reply = store.begin_round(store.create_conversation().id, f"{text} {number} " * 50, "m")
        store.finish_reply(reply.id, "answer " * 100, "done", "stop")
    store.close()


def leave_behind(folder: Path) -> None:
    """As a killed app leaves it: everything still in the write-ahead log.

    The day's backup is there before, for making it would empty the log.
    """
    Store.open(folder).close()
    Backups(folder / "glmui.db").make()
    subprocess.run([sys.executable, "-c", LEAVE_BEHIND, str(ROOT), str(folder)], check=False)
    assert (folder / "glmui.db-wal").stat().st_size > 0


def reopened(folder: Path) -> tuple[int, str]:
    """(conversations shown, code of the notice); the store must work, and have no notice the next time."""
    store = Store.open(folder)
    shown = len(store.conversations())
    conversation = store.create_conversation()
    store.begin_round(conversation.id, "still alive", "m")
    assert len(store.conversations("alive")) == 1
    notice = store.notice
    store.close()
    store = Store.open(folder)
    assert store.notice is None
    assert len(store.conversations()) == shown + 1
    store.close()
    if notice:
        assert "{" not in notice.message("en") + notice.message("zh")
    return shown, notice.code if notice else ""


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_database_is_kept_and_the_backup_comes_back(tmp_path: Path, damage: str):
    filled(tmp_path)
    Backups(tmp_path / "glmui.db").make()
    filled(tmp_path, "after the backup")
    DAMAGES[damage](tmp_path / "glmui.db")
    damaged = (tmp_path / "glmui.db").read_bytes()
    assert reopened(tmp_path) == (5, "database_damaged_restored")
    (kept,) = tmp_path.glob("glmui.damaged-*.db")
    assert kept.read_bytes() == damaged


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_a_backup_it_starts_empty_and_says_so(tmp_path: Path, damage: str):
    filled(tmp_path)
    shutil.rmtree(tmp_path / "backups", ignore_errors=True)  # a slow start has made the day's already
    DAMAGES[damage](tmp_path / "glmui.db")
    assert reopened(tmp_path) == (0, "database_damaged_empty")
    assert len(list(tmp_path.glob("glmui.damaged-*.db"))) == 1


def test_a_damaged_backup_is_passed_over_for_the_one_before(tmp_path: Path):
    filled(tmp_path)
    older = Backups(tmp_path / "glmui.db").make()
    newer = older.with_name("glmui-29991231-235959.db")
    newer.write_bytes(older.read_bytes()[:5000])
    DAMAGES["zeros"](tmp_path / "glmui.db")
    assert reopened(tmp_path) == (5, "database_damaged_restored")


def test_the_log_of_a_damaged_database_is_kept_with_it(tmp_path: Path):
    leave_behind(tmp_path)
    log = (tmp_path / "glmui.db-wal").read_bytes()
    DAMAGES["zeros"](tmp_path / "glmui.db")
    assert reopened(tmp_path) == (0, "database_damaged_restored")
    (kept,) = tmp_path.glob("glmui.damaged-*.db-wal")
    assert kept.read_bytes() == log


def test_a_backup_put_in_place_by_hand_while_the_journal_is_hot(tmp_path: Path):
    filled(tmp_path)
    file = tmp_path / "glmui.db"
    backup = Backups(file).make()
    shutil.copy(backup, file)
    change = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size=1")
connection.execute("BEGIN")
connection.execute("DELETE FROM messages")
connection.execute("DELETE FROM conversations")
os._exit(9)
"""
    subprocess.run([sys.executable, "-c", change, str(file)], check=False)
    assert (tmp_path / "glmui.db-journal").stat().st_size > 0
    assert reopened(tmp_path) == (5, "")


def test_a_missing_database_is_told(tmp_path: Path):
    filled(tmp_path)
    Backups(tmp_path / "glmui.db").make()
    (tmp_path / "glmui.db").unlink()
    assert reopened(tmp_path) == (5, "database_missing_restored")
    for backup in (tmp_path / "backups").iterdir():
        backup.unlink()
    DAMAGES["zeros"](tmp_path / "glmui.db")
    reopened(tmp_path)
    (tmp_path / "glmui.db").unlink()
    assert reopened(tmp_path) == (0, "database_missing_empty")


def test_a_killed_apps_log_is_read(tmp_path: Path):
    leave_behind(tmp_path)
    assert reopened(tmp_path) == (1, "")


@pytest.mark.parametrize(
    "damage",
    [
        lambda log: log.unlink(),
        lambda log: log.write_bytes(b""),
        lambda log: log.write_bytes(bytes(log.stat().st_size)),
        lambda log: log.write_bytes(log.read_bytes()[: log.stat().st_size // 2]),
        flip_the_middle,
    ],
    ids=["gone", "empty", "zeros", "half", "flipped"],
)
def test_messages_lost_with_the_log_are_told(tmp_path: Path, damage: Callable[[Path], object]):
    leave_behind(tmp_path)
    damage(tmp_path / "glmui.db-wal")
    assert reopened(tmp_path)[1] == "newest_messages_lost"
    if os.name == "posix":
        assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("glmui.*")} == {0o600}


def test_deleting_the_newest_messages_is_no_loss(tmp_path: Path):
    filled(tmp_path)
    store = Store.open(tmp_path)
    for conversation in store.conversations():
        store.delete(conversation.id)
    store.purge(float("inf"))
    store.close()
    assert reopened(tmp_path) == (0, "")


@pytest.mark.parametrize("part", ["data", "idx", "config"])
def test_a_damaged_search_index_is_made_anew(tmp_path: Path, part: str):
    filled(tmp_path)
    with closing(sqlite3.connect(tmp_path / "glmui.db", isolation_level=None)) as connection:
        connection.execute(f"DELETE FROM message_search_{part}")
    store = Store.open(tmp_path)
    assert store.notice is None
    assert len(store.conversations("清华")) == 5
    store.close()


def test_a_search_index_found_damaged_while_writing_is_made_anew(tmp_path: Path):
    store = Store.open(tmp_path)
    conversation = store.create_conversation()
    _, reply = store.begin_round(conversation.id, "清华", "m")
    store.finish_reply(reply.id, "大学", "stopped", "cancelled")
    with store._database.writing() as connection:
        connection.execute("UPDATE messages SET content = '别的' WHERE id = ?", (reply.id,))
    store.resume_reply(reply.id)
    store.finish_reply(reply.id, "北京", "done", "stop")
    assert len(store.conversations("北京")) == len(store.conversations("清华")) == 1
    store.close()


def test_a_damaged_byte_in_a_text_hides_nothing_else(tmp_path: Path):
    filled(tmp_path, "MARK")
    file = tmp_path / "glmui.db"
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b"MARK 3", b"\xffARK 3").replace(b"{}", b"{\x80"))
    store = Store.open(tmp_path)
    assert [len(store.thread(c.id)) for c in store.conversations()] == [2] * 5
    store.close()


@pytest.mark.parametrize(
    "campaign",
    [
        ["store_kill.py", "--kills", "10", "--stream-kills", "3", "--seed", "7"],
        ["store_damage.py", "--copies", "60", "--seed", "7"],
    ],
    ids=["kill", "damage"],
)
@pytest.mark.slow
def test_a_sample_of_the_campaign(campaign: list[str]):
    script, *options = campaign
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
