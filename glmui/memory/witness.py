"""Whether a process that was killed was killed for want of memory: what can be known of it from outside.

A SIGKILL says nothing of who sent it. Linux counts those that it sends for want of memory, for each control
group and for the whole machine; programs such as systemd-oomd, or the kernel of a Mac, do it while next to
nothing is free. Where neither is seen, it may have been anybody.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

_SCARCE = 0.08  # part of RAM (and of swap, if any) that is free where something is about to be killed
KILLED = -getattr(signal, "SIGKILL", 9)  # an exit code
_REFUSED = (0xC0000017, 0xC000012D)  # Windows: STATUS_NO_MEMORY, STATUS_COMMITMENT_LIMIT
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


class Witness:
    """Begins with the process, and looks at the machine's memory now and then while it lives."""

    def __init__(self, kills: Callable[[], int | None] | None = None) -> None:
        self._kills = kills or count_kills
        self._before = self._kills()
        self._scarce = False

    def look(self) -> None:
        """To be called about once a second: what happened earlier happened to others."""
        self._before = self._kills()
        self._scarce = is_scarce()

    def memory_ran_out(self, exit_code: int | None) -> bool:
        """Whether that is why a process ended with this code (negative: a signal's number)."""
        if exit_code in _REFUSED:
            return True
        return exit_code == KILLED and (self._scarce or self._has_grown())

    def _has_grown(self) -> bool:
        now = self._kills()
        return now is not None and self._before is not None and now > self._before


def is_scarce() -> bool:
    """Whether there is hardly any memory left."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return memory.available < _SCARCE * memory.total and swap.free <= _SCARCE * swap.total


def count_kills(root: Path = Path("/")) -> int | None:
    """How often Linux has ended a process for want of memory: in our control group, or where that is not
    told, on the whole machine. None where neither is."""
    for file in (*_own_counters(root), root / "proc/vmstat"):
        with suppress(OSError):
            if found := _COUNT.search(file.read_text(encoding="utf-8")):
                return int(found[1])
    return None


def _own_counters(root: Path) -> list[Path]:
    """The files of our control group that count, of version 2 and 1."""
    groups, files = root / "sys/fs/cgroup", []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                files.append(groups / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                files.append(groups / "memory" / path.lstrip("/") / "memory.oom_control")
    return files
