"""Linear layers in C for the CPU: compiled on the user's machine, checked against torch, then used.

`load` is all a caller needs. Where no kernel can be used, torch's own path stays, and the reason is told.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmui.quant.kernels.cpu.build import Compiler, NotBuilt, build, compilers
from glmui.quant.kernels.cpu.check import is_right
from glmui.quant.kernels.cpu.native import Kernels, Library, Numerics, Packed, fits

__all__ = ["Kernels", "Loaded", "Numerics", "Packed", "fits", "load"]

_log = logging.getLogger(__name__)
_TRIES = 2  # a check that never ended so often was ended by the kernels, not by chance


@dataclass(frozen=True, slots=True)
class Loaded:
    """kernels: None when torch must do without. reason: a key of the locales' "reasons", in which {kernel} is
    the name of the kernels."""

    kernels: Kernels | None
    reason: str

    @property
    def name(self) -> str:
        """The target in use, such as "avx512_vnni", or "torch"."""
        return self.kernels.name if self.kernels else "torch"


def load(
    cache: Path, threads: int = 1, target: str | None = None, using: Sequence[Compiler] | None = None
) -> Loaded:
    """The best kernels this machine can run, built into the folder `cache` where they are not there yet.

    Building takes some seconds, all else milliseconds. Never raises for anything the machine lacks.
    target: only this one, such as "avx2" or "portable". using: other compilers than the machine's.
    """
    try:
        file = build(cache, compilers() if using is None else using)
        library = Library(file)
    except NotBuilt as error:
        return Loaded(None, error.reason)
    except (OSError, AttributeError) as error:
        _log.debug("kernels: %s", error)
        return Loaded(None, "reasons.kernels_not_built")
    names = [name for name in library.targets() if target in (None, name)]
    if not names:
        return Loaded(None, "reasons.kernels_not_here")
    for name in names:
        if kernels := _tried(library, name, threads, file.with_suffix(f".{name}.trying")):
            return Loaded(kernels, "reasons.kernels" if name == names[0] else "reasons.kernels_second")
    return Loaded(None, "reasons.kernels_wrong")


def _tried(library: Library, name: str, threads: int, diary: Path) -> Kernels | None:
    """The kernels, once they are known to be right; None when they are wrong or ended the program when tried.

    `diary` holds a letter for each try that has not come back, for a fault in C cannot be caught.
    """
    try:
        if diary.is_file() and diary.stat().st_size >= _TRIES:
            return None
        with diary.open("a", encoding="ascii") as entry:
            entry.write("x")
        kernels = Kernels(library, name, threads)
        right = is_right(kernels)
        diary.unlink(missing_ok=True)
    except (OSError, MemoryError) as error:
        _log.debug("kernels %s: %s", name, error)
        return None
    return kernels if right else None
