"""kill -9 against the store: what was acknowledged must be there, whenever the power goes.

    python benchmarks/store_kill.py --kills 1000 --stream-kills 200 --seed 1

A child process writes and tells on a pipe what has been committed; the parent kills it at a random
moment (also while it opens the database), opens the database itself and looks. Exit status 1 when
anything was lost. `--kills`: rounds being written; `--stream-kills`: replies growing, saved as the
chat does it, every 32 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glmui.store import Store, StoredMessage

SAVE_EVERY = 32  # tokens
LONGEST = 0.25  # seconds from the child's opening to its end
FRESH_EVERY = 100  # kills, then a new data folder


def write_rounds(folder: Path) -> None:
    """Child: whole rounds as fast as the disk allows; "ID TEXT" follows each committed question."""
    store = Store.open(folder)
    known = store.conversations()
    conversation = known[0] if known else store.create_conversation()
    for number in itertools.count():
        question, reply = store.begin_round(conversation.id, f"{number} {random.random()} 你好", "model")
        say(f"{question.id} {question.content}")
        store.grow_reply(reply.id, "half an answer")
        store.finish_reply(reply.id, "an answer", "done", "stop")


def write_stream(folder: Path) -> None:
    """Child: one reply of tokens "t ", saved every SAVE_EVERY; "ID TOKENS" follows each token made."""
    store = Store.open(folder)
    _, reply = store.begin_round(store.create_conversation().id, "Tell me a long story", "model")
    for tokens in itertools.count(1):
        say(f"{reply.id} {tokens}")
        if tokens % SAVE_EVERY == 0:
            store.grow_reply(reply.id, "t " * tokens)
        time.sleep(0.0005)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def killed_child(what: str, folder: Path, chance: random.Random) -> list[str]:
    """Run a child, kill it, and return every whole line it said after it began to open the store."""
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(chance.uniform(0, LONGEST))
        child.kill()
        said = child.stdout.read()
    return said.split("\n")[:-1]


def check_rounds(store: Store, said: list[str]) -> Iterator[str]:
    for line in said:
        number, text = line.split(" ", 1)
        if found(store, int(number), text) is None:
            yield "acknowledged message lost"
    for conversation in store.conversations():
        if any(message.state == "streaming" for message in store.thread(conversation.id)):
            yield "reply not marked"


def check_stream(store: Store, said: list[str]) -> Iterator[str]:
    if not said:
        return
    number, tokens = map(int, said[-1].split())
    reply = store.get_message(number)
    # What was made after the last line came through cannot be known: one token at most.
    if tokens - reply.content.count("t ") > SAVE_EVERY:
        yield "more than 32 tokens lost"
    if reply.state != "interrupted":
        yield "reply not marked"
    store.resume_reply(number)
    store.finish_reply(number, reply.content + "end", "done", "stop")
    if found(store, number, reply.content + "end") is None:
        yield "reply not continued"


def found(store: Store, number: int, text: str) -> StoredMessage | None:
    message = store.get_message(number)
    return message if message.content == text else None


CHECKS = {"rounds": (write_rounds, check_rounds), "stream": (write_stream, check_stream)}


def campaign(what: str, kills: int, chance: random.Random) -> Counter[str]:
    """Kill `kills` children; returns how often each thing happened."""
    counts: Counter[str] = Counter()
    for done in range(0, kills, FRESH_EVERY):
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(min(FRESH_EVERY, kills - done)):
                counts += one_kill(what, Path(folder), chance)
    return counts


def one_kill(what: str, folder: Path, chance: random.Random) -> Counter[str]:
    said = killed_child(what, folder, chance)
    counts = Counter(kills=1, acknowledged=len(said))
    with closing(Store.open(folder)) as store:
        counts.update(CHECKS[what][1](store, said))
        if store.notice is not None:
            counts[f"notice {store.notice.code}"] += 1
    with closing(sqlite3.connect(folder / "glmui.db")) as connection:
        if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
            counts["integrity_check failed"] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--stream-kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        say("opening")
        CHECKS[options.child][0](options.folder)
    chance = random.Random(options.seed)
    bad = 0
    print(f"{'':14}{'kills':>7}{'acknowledged':>14}{'faults':>8}{'seconds':>9}")
    for what, kills in (("rounds", options.kills), ("stream", options.stream_kills)):
        begun = time.monotonic()
        counts = campaign(what, kills, chance)
        acknowledged, faults = counts.pop("acknowledged", 0), counts.total() - counts.pop("kills", 0)
        print(f"{what:14}{kills:7}{acknowledged:14}{faults:8}{time.monotonic() - begun:9.1f}")
        for fault, number in counts.items():
            print(f"  {fault}: {number}")
        bad += faults
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
