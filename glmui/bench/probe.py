"""How fast this machine's memory can be read: what no decoding can be faster than."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np


class ReadProbe:
    """Reads a buffer from end to end with several threads.

    Needs `size` bytes of memory, by default well above any last-level cache. A bitwise or costs the processor
    less than the memory needs to deliver, so memory is what is measured.
    """

    def __init__(self, threads: int, size: int = 1 << 30) -> None:
        parts = max(threads, size >> 24)  # 16 MiB each, so that a thread held up by others holds up nobody
        self._parts = np.array_split(np.ones(size // 8, np.int64), parts)
        self._bytes = size // 8 * 8
        self._pool = ThreadPoolExecutor(threads)

    def measure(self, reads: int = 3) -> float:
        """GB/s, the best of several reads."""
        return self._bytes / min(self._read() for _ in range(reads)) / 1e9

    def _read(self) -> float:
        began = time.perf_counter()
        list(self._pool.map(np.bitwise_or.reduce, self._parts))  # numpy lets other threads run meanwhile
        return time.perf_counter() - began

    def close(self) -> None:
        self._pool.shutdown()
