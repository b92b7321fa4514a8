"""A stand-in for a card: the kernels' own sources, compiled for this processor and run thread by thread.

What CUDA would bring is in emulated_card.h. An EmulatedModule is a driver.Module, so a class that starts
kernels is tested with tensors in memory, its arguments included:

    kernels = CardKernels(EmulatedModule(), "emulated")
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache, partial
from math import ceil
from pathlib import Path
from typing import Any

import pytest

import glmui.quant.kernels.cuda as cuda
from glmui.engine.loaded import kernel_folder
from glmui.quant.kernels.cpu.build import Compiler, compilers
from glmui.quant.kernels.cuda.driver import Arguments, Function, Size

SOURCES = Path(cuda.__file__).parent
_HEADER = Path(__file__).with_name("emulated_card.h")
_FLAGS = [
    *("-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden"),
    *("-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"),
    "-U_FORTIFY_SOURCE",  # a checked longjmp would take a fiber's stack for a fault
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"),
    *(f'-DGLMUI_EMULATED="{_HEADER.name}"', f"-I{_HEADER.parent}", f"-I{SOURCES}"),
]
_TYPES = {"half": [], "bf16": ["-DGLMUI_BF16"]}  # endings of kernels' names


class EmulatedModule:
    """The kernels of some .cu files (all of the package's by default); each is compiled when first asked for.

    The test that makes one is skipped where there is no compiler for it.
    """

    def __init__(self, *sources: Path) -> None:
        if sys.platform != "linux":
            pytest.skip("the emulated card needs Linux")
        if not _compilers():
            pytest.skip("the emulated card needs a C++ compiler")
        self._sources = sources or sorted(SOURCES.glob("*.cu"))

    def function(self, name: str) -> EmulatedFunction:
        """The kernel of this name, such as linear_4_1_half. Raises KeyError."""
        stem, _, dtype = name.rpartition("_")
        for source in self._sources if dtype in _TYPES else ():
            if launch := getattr(_library(source, dtype), f"launch_{stem}_{dtype}", None):
                return EmulatedFunction(launch)
        raise KeyError(name)


class EmulatedFunction:
    def __init__(self, launch: Any) -> None:
        self._launch = launch
        self._launch.restype = ctypes.c_char_p

    def __call__(self, grid: Size, block: Size, shared: int, arguments: Arguments) -> None:
        """Run it to its end. Raises RuntimeError for what would be a fault, a hang or chance on a card."""
        count = len(arguments)
        addresses = (ctypes.c_void_p * count)(*map(ctypes.addressof, arguments))
        sizes = (ctypes.c_uint * count)(*map(ctypes.sizeof, arguments))
        trouble = self._launch((ctypes.c_uint * 7)(*grid, *block, shared), addresses, sizes, count)
        if trouble is not None:
            raise RuntimeError(trouble.decode())


class FencedModule:
    """A module whose kernels get copies of tensors which begin, or end, where this process has no memory.

    sizes: {place among the arguments: bytes} of the tensors. What a kernel writes comes back into the real
    ones.
    """

    def __init__(self, card: EmulatedModule, sizes: Mapping[int, int], at_end: bool) -> None:
        self._card, self._sizes, self._at_end = card, sizes, at_end

    def function(self, name: str) -> Function:
        return partial(self._start, self._card.function(name))

    def _start(
        self, function: EmulatedFunction, grid: Size, block: Size, shared: int, given: Arguments
    ) -> None:
        arguments, rooms = list(given), {place: _Room(size) for place, size in self._sizes.items()}
        for place, room in rooms.items():
            address = room.end - self._sizes[place] if self._at_end else room.begin
            arguments[place] = ctypes.c_void_p(address)
            ctypes.memmove(address, given[place].value, self._sizes[place])
        function(grid, block, shared, arguments)
        for place, size in self._sizes.items():
            ctypes.memmove(given[place].value, arguments[place].value, size)


class _Room:
    """Memory between two pages that nobody may touch. begin, end: addresses."""

    def __init__(self, size: int) -> None:
        pages = ceil(size / mmap.PAGESIZE)
        self._memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.begin, self.end = (start + page * mmap.PAGESIZE for page in (1, pages + 1))
        for fence in (start, self.end):
            assert not _protect(fence, mmap.PAGESIZE, 0)


def _protect(address: int, size: int, allowed: int) -> int:
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return int(protect(address, size, allowed))


@cache
def _library(source: Path, dtype: str) -> ctypes.PyDLL:
    """A source as a library, built once for all workers of a run."""
    texts = [file.read_text("utf-8") for file in (_HEADER, *sorted(SOURCES.glob("*.cuh")), source)]
    digest = hashlib.sha256("\0".join([*texts, *_FLAGS]).encode()).hexdigest()[:16]
    file = kernel_folder().parent / f"emulated-{source.stem}-{dtype}-{digest}.so"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as place:
            _compile(_compilers()[0], [*_FLAGS, *_TYPES[dtype], str(source)], Path(place) / "library.so")
            os.replace(Path(place) / "library.so", file)
    return ctypes.PyDLL(str(file))  # one launch at a time, whatever threads start them


def _compile(compiler: Compiler, arguments: Sequence[str], file: Path) -> None:
    environment = {name: str(file.parent / inner) for name, inner in compiler.environment.items()}
    command = [*compiler.command, *arguments, "-o", str(file)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr


@cache
def _compilers() -> list[Compiler]:
    """Those of this machine's C compilers that know C++ too."""
    found = []
    for compiler in compilers():
        with tempfile.TemporaryDirectory() as place:
            try:
                source = Path(place) / "empty.cpp"
                source.write_text("#include <ucontext.h>\n")
                _compile(
                    compiler, ["-x", "c++", "-std=c++17", "-shared", str(source)], Path(place) / "empty.so"
                )
                found.append(compiler)
            except (AssertionError, OSError):
                continue
    return found
