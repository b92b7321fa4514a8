"""Downloads from a server that fails: each must end in the right files or in a clear sentence.

    python benchmarks/download_faults.py --downloads 200 --kills 20 --seed 1
    python benchmarks/download_faults.py --downloads 0 --kills 0 --large 120

A stand-in hub (tests/hub_server.py) serves a small model over HTTP and spoils answers. `--downloads`: models
fetched while answers are cut, stalled, redirected, changed, replaced …; `--kills`: models whose downloader
is killed (kill -9) three times, at random moments; `--large`: MB of one file that is fetched with the
shipped settings over a line of `--line` Mbit/s and killed five times. After each the folder is looked at: no
file under its own name may be wrong, what is left must serve the next try, and what the server sent and the
journal does not know of may be at most 8 MB. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glmui.errors import FetchError, GlmuiError
from glmui.hub.catalogue import Licence, Offer, RemoteFile
from glmui.hub.download import Control, download
from glmui.hub.part import PartFile
from glmui.hub.patience import Patience
from glmui.hub.sources import Source
from tests.hub_server import API, StandInHub

REPO = "maker/model"
PATHS = ("config.json", "ice_text.model", "pytorch_model.bin")
QUICK = Patience(
    tries=5, first_wait=0.01, longest_wait=0.05, stall_seconds=0.25, piece_bytes=300_000, save_bytes=400_000
)
MOST_TWICE = 8_000_000  # bytes

KINDS = [
    "cut", "reset", "stall", "whole", "etag", "content_range", "flip", "page", "pointer", "short", "empty",
    "hop", "loop", "elsewhere", "downgrade", "416", "403", "404", "429", "500", "503", "changed", "no_space",
    "api",
]  # fmt: skip


@dataclass
class Result:
    kind: str
    outcome: str  # "whole", or the error's code
    twice: int = 0  # bytes of the large file sent more than once, less what the faults spoilt
    wrong: list[str] = field(default_factory=list)


def make_model(folder: Path, dice: random.Random, weights: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        "config.json": dice.randint(2, 900),
        "ice_text.model": dice.randint(1, 90_000),
        "pytorch_model.bin": weights,
    }
    for name, size in sizes.items():
        with (folder / name).open("wb") as opened:
            for start in range(0, size, 1 << 20):
                opened.write(dice.randbytes(min(1 << 20, size - start)))


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def make_offer(model: Path, known: bool) -> Offer:
    """known: the catalogue knows the hash of the weights."""
    files = [
        RemoteFile(path, None, sha256(model / path) if known and path.endswith(".bin") else "")
        for path in PATHS
    ]
    repos = {"huggingface": REPO, "modelscope": REPO}
    return Offer("model", "hub", repos, tuple(files), Licence("", "", False), 1, 1, 1, 1)


def look(target: Path, contents: dict[str, set[str]], outcome: str) -> list[str]:
    """What is wrong in the folder: a file under its name that is none of the published contents."""
    wrong = [p for p in PATHS if (target / p).is_file() and sha256(target / p) not in contents[p]]
    if outcome == "whole":
        wrong += [f"{path} missing" for path in PATHS if not (target / path).is_file()]
        wrong += [f"{path.name} left" for path in target.glob("*.part*")]
    return wrong


@contextmanager
def spoil(hub: StandInHub, kind: str, dice: random.Random, model: Path) -> Iterator[None]:
    """One kind of accident, at a random place and a random number of times."""
    path, times = dice.choice(PATHS), dice.choice((1, 1, 2, 3, 6, 0))
    after = dice.randint(0, 250_000)
    with ExitStack() as stack:
        if kind == "api":
            hub.fault(dice.choice(("page", "503", "500", "404")), API, times=times)
        elif kind == "no_space":
            stack.enter_context(full_disk(dice.randint(0, 2_000_000)))
        elif kind == "changed":
            change_later(model, hub, dice)
        elif kind in ("elsewhere", "downgrade"):
            other = stack.enter_context(StandInHub({REPO: model}))
            hub.elsewhere = (
                f"{other.address}/{REPO}/resolve/main/{path}"
                if kind == "elsewhere"
                else "ftp://other.invalid/x"
            )
            hub.fault("elsewhere", path, times=times)
        else:
            hub.fault(kind, path, times=times, after=after)
        yield


def change_later(model: Path, hub: StandInHub, dice: random.Random) -> None:
    """The weights get another content (and size) once some of the old one was sent."""
    limit, real = dice.randint(100_000, 900_000), hub.count

    def count(tally: list[int], number: int) -> None:
        nonlocal limit
        real(tally, number)
        limit -= number
        if limit <= 0 < limit + number:
            draft = model / "draft"
            draft.write_bytes(random.Random(1).randbytes(1_200_000))
            draft.replace(model / "pytorch_model.bin")

    hub.count = count  # type: ignore[method-assign]


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """The disk takes so many bytes more, then says that it is full."""
    left, real = room, PartFile.write

    def write(part: PartFile, place: int, data: bytes) -> None:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(28, os.strerror(28))
        real(part, place, data)

    with mock.patch.object(PartFile, "write", write):
        yield


def one_download(seed: int, kind: str, folder: Path) -> Result:
    dice = random.Random(seed)
    model, target = folder / "model", folder / "target"
    make_model(model, dice, dice.randint(500_000, 5_000_000))
    contents = {path: {sha256(model / path)} for path in PATHS}
    offer = make_offer(model, known=kind != "changed" and dice.random() < 0.3)
    with StandInHub({REPO: model}, redirects=dice.random() < 0.8) as hub, ExitStack() as stack:
        first = dice.choice(("huggingface", "modelscope"))
        sources = [Source(first, first, hub.address)]
        if dice.random() < 0.4:  # a second source, whose answers are as they should be
            other = stack.enter_context(StandInHub({REPO: model}))
            sources.append(Source("mirror", "huggingface", other.address))
        for spoilt in {kind, *dice.sample(KINDS[:7], dice.choice((0, 0, 1, 2)))}:
            stack.enter_context(spoil(hub, spoilt, dice, model))
        result = Result(kind, attempt(offer, target, sources))
    contents["pytorch_model.bin"].add(sha256(model / "pytorch_model.bin"))
    result.wrong = look(target, contents, result.outcome)
    if (
        result.outcome != "whole" and kind != "changed"
    ):  # what is left must serve: once all is well, it ends whole
        with StandInHub({REPO: model}) as hub:
            again = attempt(offer, target, [Source("hub", "huggingface", hub.address)], Patience())
        result.wrong += look(target, contents, again) + ([] if again == "whole" else [f"then {again}"])
    return result


def attempt(offer: Offer, target: Path, sources: list[Source], patience: Patience = QUICK) -> str:
    try:
        confirmed = download(offer, target, sources, lambda progress: None, Control(), patience)
    except FetchError as error:
        sentences = [error.message("en"), error.message("zh")]
        return (
            error.code
            if all("{" not in text and "errors." not in text for text in sentences)
            else "no sentence"
        )
    except GlmuiError as error:
        return f"unexpected {error.code}"
    right = all(confirmed[path] == sha256(target / path) for path in PATHS)
    return "whole" if right else "wrong result"


def one_killed(
    seed: int, folder: Path, weights: int, kills: int, rate: int, patience: str = "quick"
) -> Result:
    """Kill the downloader at random moments until so many kills are done; then let it end."""
    dice = random.Random(seed)
    model, target = folder / "model", folder / "target"
    make_model(model, dice, weights)
    contents = {path: {sha256(model / path)} for path in PATHS}
    worst, killed = 0, 0
    with StandInHub({REPO: model}) as hub:
        hub.rate = rate
        while True:
            before, had = hub.sent, kept(target)
            child = start_child(target, hub.address, patience)
            if killed < kills:
                wait_for(hub, before, dice.uniform(0.05, 0.9) * (weights - had) / (kills - killed), child)
            else:
                child.wait(timeout=120)
            done = child.poll() is not None
            child.send_signal(signal.SIGKILL)
            child.wait()
            time.sleep(0.05)  # the server notices
            worst = max(worst, hub.sent - before - (kept(target) - had)) if not done else worst
            killed += 1
            if done:
                break
    outcome = "whole" if child.returncode == 0 else f"exit {child.returncode}"
    wrong = look(target, contents, outcome) + ([f"{worst} bytes twice"] if worst > MOST_TWICE else [])
    return Result("kill -9", outcome, worst, wrong)


def kept(target: Path) -> int:
    """Bytes that the next run need not fetch: whole files, and what the journals tell of."""
    whole = sum((target / path).stat().st_size for path in PATHS if (target / path).is_file())
    journals = [json.loads(file.read_text()) for file in target.glob("*.part.json")]
    return whole + sum(end - start for journal in journals for start, end in journal["done"])


def wait_for(hub: StandInHub, before: int, number: float, child: subprocess.Popen[bytes]) -> None:
    while hub.sent - before < number and child.poll() is None:
        time.sleep(0.001)


def start_child(target: Path, address: str, patience: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--child", str(target), address, patience])


def child(target: str, address: str, patience: str) -> int:
    files = tuple(RemoteFile(path) for path in PATHS)
    offer = Offer("model", "hub", {"huggingface": REPO}, files, Licence("", "", False), 1, 1, 1, 1)
    chosen = QUICK if patience == "quick" else Patience()
    download(
        offer, Path(target), [Source("hub", "huggingface", address)], lambda progress: None, Control(), chosen
    )
    return 0


def campaign(downloads: int, kills: int, large: int, line: int, seed: int) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(downloads):
            place = Path(folder) / "one"
            yield one_download(seed + number, KINDS[number % len(KINDS)], place)
            shutil.rmtree(place)
        for number in range(kills):
            place = Path(folder) / "killed"
            yield one_killed(seed + number, place, 4_000_000, 3, 8_000_000)
            shutil.rmtree(place)
        if large:
            yield one_killed(
                seed, Path(folder) / "large", large * 10**6, 5, line * 125_000 // 4, "as shipped"
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--downloads", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--large", type=int, default=0, metavar="MB")
    parser.add_argument("--line", type=int, default=200, metavar="MBIT")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began, bad, table = time.monotonic(), 0, Counter[tuple[str, str]]()
    worst = 0
    for result in campaign(options.downloads, options.kills, options.large, options.line, options.seed):
        table[result.kind, result.outcome] += 1
        worst = max(worst, result.twice)
        if result.wrong or result.outcome.split()[0] in ("unexpected", "wrong", "no", "exit"):
            bad += 1
            print("WRONG", result)
    for (kind, outcome), count in sorted(table.items()):
        print(f"{kind:14} {outcome:20} {count}")
    print(
        f"fetched again after a kill, at most: {worst} bytes; wrong: {bad}; {time.monotonic() - began:.0f} s"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main())
