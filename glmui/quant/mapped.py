"""Giving mapped memory back: a tensor that lies in a file need not lie in memory too once it was read."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")


def release(tensor: Tensor) -> None:
    """Let the system drop the pages of a tensor that is mapped from a file; if touched, they are read again.

    Does nothing for tensors in ordinary memory, which would lose their values, and on systems but Linux.
    """
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of this tensor only
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end and _in_a_file(begin, end):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        advise(begin, end - begin, mmap.MADV_DONTNEED)


def _in_a_file(begin: int, end: int) -> bool:
    """Whether these addresses belong to one mapping of a file."""
    if not _MAPS.exists():
        return False
    for line in _MAPS.read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first <= begin < last:
            return end <= last and inode != "0"
    return False
