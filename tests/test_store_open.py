"""Opening a data folder: locks, permissions, old and new schemas, backups, a full disk."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from glmui.errors import StoreError
from glmui.store import Store
from glmui.store.backups import KEPT, Backups
from glmui.store.database import connect
from glmui.store.migrations import MIGRATIONS, migrate, version

ROOT = Path(__file__).resolve().parent.parent


def refusal(call: Callable[[], object]) -> StoreError:
    with pytest.raises(StoreError) as caught:
        call()
    assert "{" not in caught.value.message("en") + caught.value.message("zh")
    return caught.value


def filled(folder: Path, text: str = "清华大学") -> str:
    store = Store.open(folder)
    conversation = store.create_conversation()
    _, reply = store.begin_round(conversation.id, text, "m")
    store.finish_reply(reply.id, "answer", "done", "stop")
    store.close()
    return conversation.id


def wait_for(what: Callable[[], object], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


# Who may open it


def test_a_second_store_on_the_same_folder_is_refused_with_the_holders_pid(tmp_path: Path):
    store = Store.open(tmp_path)
    error = refusal(lambda: Store.open(tmp_path))
    assert (error.code, error.values["pid"]) == ("database_in_use", os.getpid())
    store.close()
    store.close()
    Store.open(tmp_path).close()


def test_another_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path):
    child = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from glmui.store import Store
store = Store.open(Path(sys.argv[2]))
print("open", flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", child, str(ROOT), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        assert refusal(lambda: Store.open(tmp_path)).values["pid"] == process.pid
        process.kill()
    Store.open(tmp_path).close()


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_only_this_account_may_read(tmp_path: Path):
    folder = tmp_path / "a" / "data"
    filled(folder)
    Backups(folder / "glmui.db").make()
    store = Store.open(folder)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {"glmui.db", "glmui.db-wal", "glmui.lock"} <= {file.name for file in files}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert {stat.S_IMODE(f.stat().st_mode) for f in (folder, folder / "backups")} == {0o700}
    store.close()


def test_a_folder_that_cannot_be_made_or_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    error = refusal(lambda: Store.open(tmp_path / "file" / "data"))
    assert error.code == "data_folder_unwritable"
    assert str(tmp_path / "file" / "data") in error.message("zh")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_the_right_to_write_is_named(tmp_path: Path):
    tmp_path.chmod(0o500)
    assert refusal(lambda: Store.open(tmp_path)).code == "data_folder_unwritable"
    tmp_path.chmod(0o700)


def test_a_folder_with_blanks_and_chinese_and_signs_in_its_name(tmp_path: Path):
    folder = tmp_path / "我的 数据?#%20&"
    conversation = filled(folder)
    store = Store.open(folder)
    assert len(store.thread(conversation)) == 2
    store.close()


def test_a_database_locked_by_another_program_is_told_and_works_afterwards(tmp_path: Path):
    filled(tmp_path)
    store = Store.open(tmp_path)
    store._database._writer.execute("PRAGMA busy_timeout=50")  # type: ignore[union-attr]
    with closing(sqlite3.connect(tmp_path / "glmui.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert refusal(store.create_conversation).code == "database_locked"
        assert len(store.conversations()) == 1
        other.execute("COMMIT")
    store.create_conversation()
    store.close()


def test_a_closed_store_refuses_and_does_not_open_again(tmp_path: Path):
    store = Store.open(tmp_path)
    store.close()
    assert refusal(store.conversations).code == "database_error"
    assert refusal(store.create_conversation).code == "database_error"


# Pragmas


def test_connections_are_set_up_as_promised(tmp_path: Path):
    store = Store.open(tmp_path)

    def pragma(connection: sqlite3.Connection, name: str) -> object:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]

    with store._database.writing() as writer:
        assert pragma(writer, "journal_mode") == "wal"
        assert pragma(writer, "synchronous") == 2
    with store._database.reading() as reader:
        for connection in (writer, reader):
            assert pragma(connection, "foreign_keys") == 1
            assert pragma(connection, "trusted_schema") == 0
            assert pragma(connection, "busy_timeout") == 5000
        with pytest.raises(sqlite3.OperationalError):
            reader.execute("DELETE FROM conversations")
    store.close()


# Schemas


def test_a_blank_file_takes_every_step():
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        assert version(connection) == 0
        migrate(connection)
        assert version(connection) == len(MIGRATIONS)
        migrate(connection)
        strict = connection.execute(
            "SELECT name, strict FROM pragma_table_list WHERE type = 'table'"
        ).fetchall()
        ours = {
            name: is_strict for name, is_strict in strict if "_search" not in name and "sqlite" not in name
        }
        assert ours == {"conversations": 1, "messages": 1, "migrations": 1}


@pytest.mark.parametrize("old", range(1, len(MIGRATIONS)))
def test_every_old_schema_is_brought_up_to_date_with_a_backup(tmp_path: Path, old: int):
    with closing(sqlite3.connect(tmp_path / "glmui.db", isolation_level=None)) as connection:
        migrate(connection, MIGRATIONS[:old])
        connection.execute(
            "INSERT INTO conversations VALUES (1, 'c', '图灵测试', 0, 1.0, 2.0, NULL, '{}', NULL)"
        )
        connection.execute(
            "INSERT INTO messages VALUES"
            " (1, 'c', NULL, 'user', '清华大学', 'done', NULL, NULL, '', 0, NULL, '', 1)"
        )
        connection.execute("UPDATE conversations SET head_id = 1")
    store = Store.open(tmp_path)
    assert [message.content for message in store.thread("c")] == ["清华大学"]
    assert len(store.conversations("清华")) == len(store.conversations("图灵")) == 1
    assert store.notice is None
    store.close()
    (backup,) = Backups(tmp_path / "glmui.db").newest_first()
    with closing(connect(backup, "ro", immutable=True)) as connection:
        assert version(connection) == old


def test_a_step_that_fails_leaves_the_file_as_it_was(tmp_path: Path):
    filled(tmp_path)

    def broken(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE half_done (x)")
        connection.execute("DELETE FROM messages")
        connection.execute("nonsense")

    with closing(connect(tmp_path / "glmui.db")) as connection:
        with pytest.raises(sqlite3.OperationalError):
            migrate(connection, [*MIGRATIONS, broken])
        assert version(connection) == len(MIGRATIONS)
        assert connection.execute("SELECT count(*) FROM messages").fetchone()[0] == 2
        assert not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'half_done'").fetchone()


def test_a_newer_schema_is_shown_but_never_changed(tmp_path: Path):
    conversation = filled(tmp_path)
    with closing(connect(tmp_path / "glmui.db")) as connection:
        connection.execute("INSERT INTO migrations VALUES (?, 0)", (len(MIGRATIONS) + 1,))
        connection.execute("ALTER TABLE messages ADD COLUMN novelty TEXT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = (tmp_path / "glmui.db").read_bytes()
    store = Store.open(tmp_path)
    assert store.read_only
    assert store.notice is not None
    assert store.notice.code == "database_newer"
    assert len(store.thread(conversation)) == 2
    assert len(store.conversations("清华")) == 1
    assert refusal(store.create_conversation).code == "database_read_only"
    assert refusal(lambda: store.begin_round(conversation, "x", "m")).code == "database_read_only"
    store.close()
    assert (tmp_path / "glmui.db").read_bytes() == before


# Backups


def test_the_first_days_backup_is_made_once_and_can_be_opened(tmp_path: Path):
    conversation = filled(tmp_path)
    backups = Backups(tmp_path / "glmui.db")
    for _ in range(3):
        store = Store.open(tmp_path)
        wait_for(backups.newest_first)
        store.close()
    (backup,) = backups.newest_first()
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(backup, other / "glmui.db")
    store = Store.open(other)
    assert len(store.thread(conversation)) == 2
    store.close()


def test_an_empty_database_is_not_backed_up(tmp_path: Path):
    Store.open(tmp_path).close()
    assert not (tmp_path / "backups").exists()


def test_seven_backups_are_kept_and_one_is_due_after_a_day(tmp_path: Path):
    filled(tmp_path)
    backups = Backups(tmp_path / "glmui.db")

    def age(backup: Path, **age: int) -> None:
        backup.rename(backup.with_name(f"glmui-{datetime.now() - timedelta(**age):%Y%m%d-%H%M%S}.db"))

    for days in range(12, 1, -1):
        age(backups.make(), days=days)
    assert backups.due()
    age(backups.make(), hours=23)
    assert not backups.due()
    newest = backups.make()
    assert len(backups.newest_first()) == KEPT
    assert backups.newest_first()[0] == newest


def test_a_backup_made_while_others_write_is_whole(tmp_path: Path):
    filled(tmp_path)
    store = Store.open(tmp_path)
    backups = Backups(tmp_path / "glmui.db")
    wait_for(backups.newest_first)  # the day's; what is made from here on may meet its end
    conversation = store.create_conversation()
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            store.begin_round(conversation.id, "text " * 500, "m")

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(5):
        assert backups.make().exists()
    stop.set()
    writer.join()
    store.close()


# A full disk


def test_a_full_disk_is_told_keeps_the_old_and_goes_on_when_there_is_room(tmp_path: Path):
    conversation = filled(tmp_path)
    store = Store.open(tmp_path)
    _, reply = store.begin_round(conversation, "question", "m")
    writer = store._database._writer
    assert writer is not None
    pages = writer.execute("PRAGMA page_count").fetchone()[0]
    writer.execute(f"PRAGMA max_page_count={pages}")
    big = "清华大学" * 20_000
    calls: list[Callable[[], object]] = [
        lambda: store.grow_reply(reply.id, big),
        lambda: store.finish_reply(reply.id, big, "done", "stop"),
        lambda: store.begin_round(conversation, big, "m"),
    ]
    for call in calls:
        error = refusal(call)
        assert error.code == "disk_full"
        assert str(tmp_path) in error.message("en")
    assert [message.content for message in store.thread(conversation)][:3] == [
        "清华大学",
        "answer",
        "question",
    ]
    assert store.get_message(reply.id).state == "streaming"
    writer.execute("PRAGMA max_page_count=1000000")
    store.finish_reply(reply.id, big, "done", "stop")
    assert store.get_message(reply.id).content == big
    assert len(store.conversations("学清")) == 1
    store.close()


FULL_DISK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from glmui.errors import StoreError
from glmui.store import Store
folder = Path(sys.argv[2])
store = Store.open(folder)
conversation = store.create_conversation()
saved = []
for number in range(1000):
    try:
        saved.append(store.begin_round(conversation.id, f"{number} " + "text" * 2000, "m")[0].id)
    except StoreError as error:
        assert error.code == "disk_full", error
        break
else:
    raise SystemExit("the disk never filled")
for _ in range(3):
    try:
        store.begin_round(conversation.id, "x" * 30000, "m")
    except StoreError as error:
        assert error.code == "disk_full", error
assert [store.get_message(number).id for number in saved] == saved
(folder / "ballast").unlink()
store.begin_round(conversation.id, "room again", "m")
store.close()
store = Store.open(folder)
assert store.notice is None, store.notice
assert store.thread(conversation.id)[-2].content == "room again"
store.close()
print("well")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a small file system of its own")
def test_a_really_full_disk(tmp_path: Path):
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK, encoding="utf-8")
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = 'mount -t tmpfs -o size=3m none "$1" && head -c 1000000 /dev/zero > "$1/ballast" || exit 77; '
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        inside + 'shift; exec "$@"',
        "sh",
    ]
    command += [str(disk), sys.executable, str(script), str(ROOT), str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode in (1, 77) and "well" not in done.stdout and "Traceback" not in done.stderr:
        pytest.skip("this system lets nobody mount a small file system")
    assert (done.stdout, done.returncode) == ("well\n", 0), done.stderr
