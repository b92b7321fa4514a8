"""How full the memory is: NVIDIA cards through NVML, the system and the engine through psutil.

Every value may be unknown (None): drivers are missing, cards vanish, WSL answers half of the
questions. None of that is an error of the app, so nothing here raises.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

GpuError = Literal["", "no_driver", "unknown"]

# Seconds until NVML is started anew after a failure: it may take long, and a driver seldom comes back.
_RETRY = 60.0
_MOST_CARDS = 64
_NO_DRIVER = ("ImportError", "ModuleNotFoundError", "NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded")


@dataclass(frozen=True, slots=True)
class Card:
    """One NVIDIA card. Bytes, or None where unknown; `own` is the engine process's share of `used`.

    index: NVML's, which counts all cards (memory/visible.py has torch's). uuid: "GPU-…". bus: its place,
    "00000000:1A:00.0". Both are "" where unknown.
    """

    index: int
    name: str
    used: int | None
    total: int | None
    own: int | None
    uuid: str = ""
    bus: str = ""


@dataclass(frozen=True, slots=True)
class User:
    """A program on a card. size: bytes it holds there, or None where the driver does not tell (Windows)."""

    pid: int
    name: str
    size: int | None


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the memory. Bytes, or None where unknown.

    engine_rss: what the engine process holds of the RAM; engine_private: without the files it has mapped,
    which is what its end gives back. gpu_error: "no_driver" where there is
    none, "unknown" where something about the cards could not be read.
    """

    cards: tuple[Card, ...]
    ram_used: int | None
    ram_total: int | None
    engine_rss: int | None
    gpu_error: GpuError
    engine_private: int | None = None


class Meter:
    """Reads the meters; from any thread, a few milliseconds a time. No method raises.

    nvml: a module with pynvml's functions; pynvml itself, imported at the first reading, when None.
    clock: seconds, for the retries.
    """

    def __init__(self, nvml: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._given = nvml
        self._clock = clock
        self._nvml: Any = None  # set while NVML is initialised
        self._error: GpuError = ""
        self._retry_at = clock()
        self._lock = threading.Lock()

    def read(self, engine_pid: int | None) -> Reading:
        with self._lock:
            cards = self._read_cards(engine_pid)
            rss, private = (None, None) if engine_pid is None else _held(engine_pid)
            return Reading(cards, *_ram(), rss, self._error, private)

    def users(self, index: int, most: int = 3) -> tuple[User, ...]:
        """The programs that hold most of a card's memory, the biggest first; () where that is not told."""
        with self._lock:
            self._start_where_due()
            sizes = self._sizes(self._ask("nvmlDeviceGetHandleByIndex", index))
        known = [User(pid, name, size) for pid, size in sizes.items() if (name := _name(pid))]
        return tuple(sorted(known, key=lambda user: -(user.size or 0))[:most])

    def close(self) -> None:
        """Let NVML go. A later `read` takes it up again."""
        with self._lock:
            self._shut_down()
            self._error, self._retry_at = "", self._clock()

    def _read_cards(self, engine_pid: int | None) -> tuple[Card, ...]:
        self._start_where_due()
        if self._nvml is None:
            return ()
        self._error = ""
        count = self._ask("nvmlDeviceGetCount")
        if not _is_size(count):
            self._fail("unknown")
            return ()
        cards = tuple(self._card(index, engine_pid) for index in range(min(count, _MOST_CARDS)))
        if any(card.used is None or card.total is None for card in cards):
            self._fail("unknown")
        return cards

    def _card(self, index: int, engine_pid: int | None) -> Card:
        handle = self._ask("nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            return Card(index, "", None, None, None)
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        return Card(
            index,
            _words(self._ask("nvmlDeviceGetName", handle)),
            _size(memory, "used"),
            _size(memory, "total"),
            None if engine_pid is None else self._share(handle, engine_pid),
            _words(self._ask("nvmlDeviceGetUUID", handle)),
            _words(getattr(self._ask("nvmlDeviceGetPciInfo", handle), "busId", "")),
        )

    def _share(self, handle: Any, pid: int) -> int | None:
        """What a process holds of a card: unknown on Windows, and in containers with pids of their own."""
        with suppress(Exception):
            for process in self._ask("nvmlDeviceGetComputeRunningProcesses", handle) or ():
                if process.pid == pid:
                    return _size(process, "usedGpuMemory")
        return None

    def _sizes(self, handle: Any) -> dict[int, int | None]:
        """What each process holds of a card. One that computes and draws stands in both lists."""
        sizes: dict[int, int | None] = {}
        if handle is None:
            return sizes
        for kind in ("Compute", "Graphics"):
            with suppress(Exception):
                for process in self._ask(f"nvmlDeviceGet{kind}RunningProcesses", handle) or ():
                    size = _size(process, "usedGpuMemory")
                    sizes[process.pid] = max(filter(None, (sizes.get(process.pid), size)), default=size)
        return sizes

    def _ask(self, name: str, *arguments: Any) -> Any:
        """NVML's answer, or None where it gives none."""
        try:
            return getattr(self._nvml, name)(*arguments)
        except Exception:
            return None

    def _start_where_due(self) -> None:
        if (self._nvml is None or self._error) and self._clock() >= self._retry_at:
            self._start()

    def _start(self) -> None:
        self._shut_down()
        try:
            nvml = self._given or _pynvml()
            nvml.nvmlInit()
            self._nvml = nvml
        except Exception as error:
            self._fail("no_driver" if type(error).__name__ in _NO_DRIVER else "unknown")

    def _shut_down(self) -> None:
        if self._nvml is not None:
            self._ask("nvmlShutdown")
            self._nvml = None

    def _fail(self, error: GpuError) -> None:
        self._error = error
        if self._clock() >= self._retry_at:
            self._retry_at = self._clock() + _RETRY


def _pynvml() -> Any:
    import pynvml

    return pynvml


def _ram() -> tuple[int | None, int | None]:
    """(used, total); what the system could free at once does not count as used."""
    try:
        import psutil

        memory = psutil.virtual_memory()
        return max(0, memory.total - memory.available), memory.total
    except Exception:
        return None, None


def _held(pid: int) -> tuple[int | None, int | None]:
    """What a process holds of the RAM: (all of it, without the files it has mapped)."""
    try:
        import psutil

        held = psutil.Process(pid).memory_info()
        private = getattr(held, "private", held.rss) - getattr(held, "shared", 0)
        return held.rss, max(0, private)
    except Exception:
        return None, None


def _name(pid: int) -> str:
    """A process's name, "" where there is none of that number that we may look at."""
    try:
        import psutil

        return psutil.Process(pid).name()
    except Exception:
        return ""


def _words(answer: Any) -> str:
    """NVML's text, which older bindings give as bytes."""
    return answer.decode("utf-8", "replace") if isinstance(answer, bytes) else str(answer or "")


def _size(holder: Any, name: str) -> int | None:
    value = getattr(holder, name, None)
    return value if _is_size(value) else None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
