"""Every hostile model file of the tests through the real importing process: code, seconds, memory, programs.

    python benchmarks/hostile_imports.py [--json]

With strace installed, every importing process is followed: whatever program it starts and whatever address it
connects to after it began is counted. Needs the tests' folder (small models are made from it).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
_START = re.compile(r'^(\d+) .*execve\(".*spawn_main')  # the importing process's own beginning


@dataclass
class Result:
    name: str
    expected: str
    code: str
    seconds: float  # of processor time: the machine may be busy
    memory_mb: int
    left: list[str]
    ran: bool

    @property
    def fine(self) -> bool:
        return self.code == self.expected and self.seconds <= 5 and not self.left and not self.ran


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    results = [] if not options.inside and shutil.which("strace") else run_all()
    trace: dict[str, int] = {}
    if not results:
        results, trace = traced()
    if options.json or options.inside:
        print(json.dumps({"results": [asdict(result) for result in results], **trace}))
    else:
        report(results, trace)
    return 0 if all(result.fine for result in results) and not any(trace.values()) else 1


def run_all() -> list[Result]:
    from tests.chatglm_fixture import copy_checkpoint, write_checkpoint
    from tests.hostile_models import CASES
    from tests.small_vocabulary import small_vocabulary

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        write_checkpoint(whole, "int4", small_vocabulary())
        results = []
        for name, (damage, code) in CASES.items():
            place = Path(folder) / name
            place.mkdir()
            damage(source := copy_checkpoint(whole, place / "source"))
            results.append(run_one(name, code, source, place))
            shutil.rmtree(place)
    return results


def run_one(name: str, expected: str, source: Path, place: Path) -> Result:
    from glmui.errors import GlmuiError
    from glmui.hub.importing import import_model

    shop = place / "shop"
    shop.mkdir()
    watch = Watch()
    code, began = "imported", processor_seconds()
    try:
        import_model(source, shop / "made", None, "none", {}, lambda progress: None, lambda: False)
    except GlmuiError as error:
        code = error.code
    seconds = processor_seconds() - began
    left = [path.name for path in shop.iterdir() if path.name == "made"]
    return Result(name, expected, code, round(seconds, 2), watch.stop() >> 20, left, (place / "RAN").exists())


def processor_seconds() -> float:
    """What this process's ended children have taken."""
    times = os.times()
    return times.children_user + times.children_system


class Watch:
    """The most memory of their own that this process's children had, looked at fifty times a second."""

    def __init__(self) -> None:
        self._most, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        from glmui.confined import own_memory

        me = psutil.Process()
        while not self._over.wait(0.02):
            for child in me.children():
                try:
                    self._most = max(self._most, own_memory(child))
                except psutil.Error:
                    continue

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self._most


def traced() -> tuple[list[Result], dict[str, int]]:
    """The same under strace; what the importing processes started and whom they connected to."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "trace"
        command = ["strace", "-f", "-qq", "-s", "200", "-e", "trace=execve,execveat,connect", "-o", str(log)]
        again = [*command, sys.executable, __file__, "--inside"]
        done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=False)
        values = json.loads(done.stdout.splitlines()[-1])
        lines = log.read_text(errors="replace").splitlines()
    return [Result(**result) for result in values["results"]], count(lines)


def count(lines: list[str]) -> dict[str, int]:
    """Programs started and connections made by processes that began as a spawned one, and by theirs."""
    importing = {found[1] for line in lines if (found := _START.match(line))}
    programs = connections = 0
    for line in lines:
        pid, _, call = line.partition(" ")
        if pid not in importing:
            continue
        programs += call.lstrip().startswith(("execve", "execveat")) and "spawn_main" not in call
        connections += call.lstrip().startswith("connect") and "AF_UNIX" not in call
    assert importing, "no importing process was seen"
    return {"programs": programs, "connections": connections}


def report(results: list[Result], trace: dict[str, int]) -> None:
    for result in results:
        mark = " " if result.fine else "!"
        print(f"{mark} {result.name:40} {result.code:24} {result.seconds:5.2f} s {result.memory_mb:5} MB")
    slowest = max(result.seconds for result in results)
    most = max(result.memory_mb for result in results)
    fine = sum(result.fine for result in results)
    print(f"{fine} of {len(results)} as they should; slowest {slowest} s, most memory {most} MB")
    print(
        ", ".join(f"{key}: {value}" for key, value in trace.items()) or "without strace: programs not counted"
    )


if __name__ == "__main__":
    sys.exit(main())
