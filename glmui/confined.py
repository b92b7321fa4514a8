"""A function in a process of its own that can do little: for files from strangers.

It has bounded memory and time, no network, starts no other program, and writes into one folder only. What
of this the system itself enforces differs; on Linux nearly all of it, elsewhere a hook of the interpreter
and this side's watch do it (docs/security.md tells).
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from glmui.errors import GlmuiError, from_values, to_values

_POLL_SECONDS = 0.1
_LONGEST_MESSAGE = 1 << 16  # a message is JSON, never a pickle: this side trusts nothing the other sends

Reason = Literal["cancelled", "memory", "time", "died"]
Tell = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Limits:
    """writes: the one folder it may write into. memory: bytes of its own. mapped: bytes of files it may map
    besides. file_size: the longest file it may write, in bytes."""

    writes: Path
    memory: int
    mapped: int
    cpu_seconds: int
    file_size: int


class Ended(Exception):
    """The process ended before its work was done. detail: how, for the log and those who ask."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def run(
    work: Callable[..., None],
    args: tuple[Any, ...],
    limits: Limits,
    on_told: Callable[..., None],
    cancelled: Callable[[], bool],
) -> None:
    """Call `work(tell, *args)` in that process and wait; what it tells (plain values) goes to `on_told`.

    Raises the GlmuiError that `work` raised, or Ended. The process is gone when this returns.
    """
    spawn = multiprocessing.get_context("spawn")  # inherits no socket, no lock, no open file
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(
        target=_inside, args=(theirs, limits, work, args), name="glmui-confined", daemon=True
    )
    process.start()
    theirs.close()
    try:
        _listen(ours, process, limits, on_told, cancelled)
    except (EOFError, OSError, ValueError) as error:
        process.join(1)
        raise _ended(process.exitcode) from error
    finally:
        process.kill()
        process.join()
        ours.close()


def _listen(
    pipe: Any, process: Any, limits: Limits, on_told: Callable[..., None], cancelled: Callable[[], bool]
) -> None:
    while True:
        if cancelled():
            raise Ended("cancelled")
        _watch(process.pid, limits)
        if not pipe.poll(_POLL_SECONDS):
            continue
        kind, values = json.loads(pipe.recv_bytes(_LONGEST_MESSAGE))
        if kind == "done":
            return
        if kind == "error":
            raise from_values(*values)
        if kind == "ended":
            raise Ended(*values)
        on_told(*values)


def _watch(pid: int, limits: Limits) -> None:
    """The bounds, held from this side too: not every system lets a process bind itself."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if own_memory(process) > limits.memory:
            raise Ended("memory")
        times = process.cpu_times()
        if times.user + times.system > limits.cpu_seconds:
            raise Ended("time")


def own_memory(process: psutil.Process) -> int:
    """Bytes that belong to this process alone; of files it maps only what it changed."""
    found = process.memory_info()
    shared: int = getattr(found, "shared", 0)  # Linux: pages of files
    private: int = getattr(found, "private", found.rss - shared)  # Windows counts it by itself
    return private


def _ended(exit_code: int | None) -> Ended:
    if exit_code == -getattr(signal, "SIGXCPU", 0):
        return Ended("time")
    if exit_code == -getattr(signal, "SIGKILL", 0):
        return Ended("memory")  # nobody but the system's out-of-memory killer does this
    return Ended("died", f"exit code {exit_code}")


def _inside(pipe: Any, limits: Limits, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Runs in that process."""
    from glmui.confinement import confine

    def send(kind: str, *values: Any) -> None:
        pipe.send_bytes(json.dumps([kind, values]).encode())

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the other side's to answer
    try:
        confine(limits.writes, limits.memory + limits.mapped, limits.cpu_seconds, limits.file_size)
        work(lambda *values: send("told", *values), *args)
        send("done")
    except GlmuiError as error:
        send("error", *to_values(error))
    except MemoryError:
        send("ended", "memory")
    except Exception as error:
        send("ended", "died", repr(error)[:2000])
