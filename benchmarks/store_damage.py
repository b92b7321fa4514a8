"""Damaged databases: no crash, no history that turns empty in silence.

    python benchmarks/store_damage.py --copies 500 --seed 1

Each copy of a data folder, as a killed app left it (some with a backup, some with a write-ahead
log), is damaged in one way and opened. It counts as well handled when the store opens or says in
one sentence why not, every conversation that is missing is told of, and a file put aside is kept.
Exit status 1 when one copy was not.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glmui.errors import StoreError
from glmui.store import Store
from glmui.store.backups import Backups

CONVERSATIONS, ROUNDS = 8, 12
_LEFT_BEHIND = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from store_damage import fill
fill(Path(sys.argv[3]))
os._exit(9)
"""

Damage = Callable[[Path, random.Random], None]


def fill(folder: Path) -> Store:
    """Conversations with some rounds each, the last reply still growing."""
    store = Store.open(folder)
    for number in range(CONVERSATIONS):
        conversation = store.create_conversation()
        for round_ in range(ROUNDS):
            text = f"第{round_}个问题 {number} " + "清华大学 " * 40
            _, reply = store.begin_round(conversation.id, text, "model")
            store.finish_reply(reply.id, "回答 " * 80, "done", "stop")
    store.begin_round(conversation.id, "and then?", "model")
    return store


def make_worlds(folder: Path) -> list[Path]:
    """Data folders as found after: a kill with everything in the log; a clean end and a backup; both."""
    log_only, clean, both = (folder / name for name in ("log_only", "clean", "both"))
    leave_behind(log_only)
    leave_behind(clean)
    end_with_backup(clean)
    shutil.copytree(clean, both)
    leave_behind(both)
    return [log_only, clean, both]


def leave_behind(folder: Path) -> None:
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", _LEFT_BEHIND, str(here.parent), str(here), str(folder)]
    subprocess.run(command, check=False)


def end_with_backup(folder: Path) -> None:
    Store.open(folder).close()
    Backups(folder / "glmui.db").make()


def truncate(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


def flip_header(file: Path, chance: random.Random) -> None:
    flip(file, chance.randrange(100), chance)


def flip_one(file: Path, chance: random.Random) -> None:
    flip(file, chance.randrange(file.stat().st_size), chance)


def flip_many(file: Path, chance: random.Random) -> None:
    for _ in range(200):
        flip_one(file, chance)


def flip(file: Path, offset: int, chance: random.Random) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        old = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([old ^ (1 << chance.randrange(8))]))


def zero_page(file: Path, chance: random.Random) -> None:
    overwrite(file, bytes(4096), chance)


def noise_page(file: Path, chance: random.Random) -> None:
    overwrite(file, chance.randbytes(4096), chance)


def overwrite(file: Path, page: bytes, chance: random.Random) -> None:
    with file.open("r+b") as opened:
        opened.seek(chance.randrange(file.stat().st_size) // 4096 * 4096)
        opened.write(page)


def all_zero(file: Path, chance: random.Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def empty(file: Path, chance: random.Random) -> None:
    file.write_bytes(b"")


def some_text(file: Path, chance: random.Random) -> None:
    file.write_text("<html>404 not found</html>\n" * 300, encoding="utf-8")


def gone(file: Path, chance: random.Random) -> None:
    file.unlink()


DAMAGES: tuple[Damage, ...] = (
    truncate,
    flip_header,
    flip_one,
    flip_many,
    zero_page,
    noise_page,
    all_zero,
    empty,
    some_text,
    gone,
)


def one_copy(world: Path, folder: Path, damage: Damage, chance: random.Random) -> tuple[str, str]:
    """Damage one copy and open it; returns (what was damaged, what came of it)."""
    shutil.copytree(world, folder)
    files = [file for file in (folder / "glmui.db", folder / "glmui.db-wal") if file.exists()]
    target = chance.choice(files)
    damage(target, chance)
    before = target.read_bytes() if target.exists() else b""
    return target.name, outcome(folder, before)


def outcome(folder: Path, damaged: bytes) -> str:
    try:
        store = Store.open(folder)
    except StoreError as error:
        return f"refused: {error.code}"
    try:
        shown = read_all(store)
        told = store.notice.code if store.notice else ""
        missing = shown < CONVERSATIONS
    except StoreError as error:
        return f"BAD: refused later: {error}"
    finally:
        store.close()
    if missing and not told:
        return f"BAD: {shown} conversations and no word"
    kept = [file.read_bytes() for file in folder.glob("glmui.damaged-*")]
    if damaged and told.startswith("database_damaged") and damaged not in kept:
        return "BAD: the damaged file was not kept"
    return told or "opened"


def read_all(store: Store) -> int:
    """Read everything, search, and write a round; returns how many conversations are whole enough to read."""
    shown = store.conversations()
    threads = [store.thread(conversation.id) for conversation in shown]
    store.conversations("清华大学")
    if not store.read_only:
        new = store.create_conversation()
        _, reply = store.begin_round(new.id, "still alive?", "model")
        store.finish_reply(reply.id, "yes", "done", "stop")
    return sum(1 for thread in threads if thread)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--copies", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    counts: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory() as name:
        worlds = make_worlds(Path(name))
        for number in range(options.copies):
            damage, folder = DAMAGES[number % len(DAMAGES)], Path(name) / "copy"
            counts[(damage.__name__, *one_copy(chance.choice(worlds), folder, damage, chance))] += 1
            shutil.rmtree(folder)
    for (damage_name, file, result), times in sorted(counts.items()):
        print(f"{times:5}  {damage_name:12} {file:13} {result}")
    bad = sum(times for (*_, result), times in counts.items() if result.startswith("BAD"))
    print(f"{options.copies} copies, {bad} not handled well")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
