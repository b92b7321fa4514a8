"""Compiling the kernels for one card with NVRTC, the compiler that comes with torch.

Neither a C compiler nor a CUDA toolkit nor any of its headers is needed. Each .cu is compiled by itself, once
for float16 and once for bfloat16. The images are kept in a cache folder; a file's name tells the sources, the
options, NVRTC's version and the card. What NVRTC prints is for the debug log only: a reader learns the
outcome, as a key of the locales' "reasons".
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

_log = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent
_SECONDS = 180.0  # for all images together; a few seconds as a rule
_OPTIONS = ("--std=c++17",)
_CHECKSUM = hashlib.sha256().digest_size
_WINDOWS = sys.platform == "win32"
_NVRTC = "nvrtc64_{}0_0.dll" if _WINDOWS else "libnvrtc.so.{}"
# NVRTC opens this one when it compiles, by its bare name: found only if the system knows it, or has it open.
_BUILTINS = "nvrtc-builtins64_{}{}.dll" if _WINDOWS else "libnvrtc-builtins.so.{}.{}"
_PACKAGES = {  # which bring NVRTC, and in which of their folders: on Linux, on Windows
    "nvidia": ("cu[0-9]*/lib", "cuda_nvrtc/lib", "cu[0-9]*/bin", "cu[0-9]*/bin/*", "cuda_nvrtc/bin"),
    "torch": ("lib",),
}
TYPES: Mapping[str, Sequence[str]] = {"half": (), "bf16": ("-DGLMUI_BF16",)}  # {ending of names: options}


class NotCompiled(Exception):
    """No image: the one argument is the reason, a key of the locales' "reasons"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Compiler(Protocol):
    """What makes an image of a source. architectures: the cards it knows, 86 for compute capability 8.6."""

    @property
    def version(self) -> tuple[int, int]: ...

    @property
    def architectures(self) -> Sequence[int]: ...

    def compile(self, name: str, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
        """Machine code where the options ask for sm_86, PTX for compute_86. Raises NotCompiled.

        name: for what it says of the source. headers: {name: text} of what the source includes.
        """


class Nvrtc:
    """See Compiler. Raises OSError where there is no such file, AttributeError for one before CUDA 11.2."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._do("Version", ctypes.byref(major), ctypes.byref(minor))
        self._do("GetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self._do("GetSupportedArchs", known)
        self.version = major.value, minor.value
        self.architectures: Sequence[int] = list(known)
        self._builtins = [ctypes.CDLL(str(file)) for file in _files(_BUILTINS.format(*self.version))]

    def compile(self, name: str, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
        """See Compiler."""
        program = ctypes.c_void_p()
        included = len(headers), _strings(headers.values()), _strings(headers)
        self._do("CreateProgram", ctypes.byref(program), source.encode(), name.encode(), *included)
        try:
            self._do("CompileProgram", program, len(options), _strings(options))
            return self._read(program, "CUBIN" if any("sm_" in option for option in options) else "PTX")
        finally:
            if said := self._read(program, "ProgramLog").rstrip(b"\0 \n"):
                _log.debug("NVRTC: %s", said.decode("utf-8", "replace"))
            self._do("DestroyProgram", ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._do(f"Get{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._do(f"Get{what}", program, text)
        return text.raw

    def _do(self, what: str, *arguments: object) -> None:
        if status := getattr(self._library, f"nvrtc{what}")(*arguments):
            _log.debug("nvrtc%s: %s", what, self._library.nvrtcGetErrorString(status).decode())
            raise NotCompiled("reasons.card_kernels_not_compiled")


def _strings(texts: Collection[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def find(cuda: str | None) -> Nvrtc:
    """NVRTC as it comes with torch, or the system's. Raises NotCompiled.

    cuda: torch's version of CUDA, such as "13.0"; None where it was built without.
    """
    for path in _libraries(cuda):
        try:
            return Nvrtc(path)
        except (OSError, AttributeError, NotCompiled) as error:
            _log.debug("%s: %s", path, error)
    raise NotCompiled("reasons.card_kernels_no_nvrtc")


def _libraries(cuda: str | None) -> Iterator[str]:
    """Where it may be, best first: of torch's own version of CUDA, for that one fits the driver."""
    name = _NVRTC.format((cuda or "").partition(".")[0])
    if cuda:
        yield name  # loaded by torch, or the system's
    found = sorted(_files(_NVRTC.format("[0-9]*")), key=lambda file: (file.name == name, file.name))
    yield from map(str, reversed(found))
    yield "libnvrtc.so"  # the system's, where a toolkit is installed


def _files(pattern: str) -> Iterator[Path]:
    """Files in the packages that bring NVRTC."""
    for package, folders in _PACKAGES.items():
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            for folder in folders:
                yield from Path(place).glob(f"{folder}/{pattern}")


def target(capability: tuple[int, int], known: Sequence[int]) -> str:
    """What to compile for: the card itself, or the newest one before it, by PTX that its driver compiles on.

    Raises NotCompiled where the compiler knows only newer cards.
    """
    number = capability[0] * 10 + capability[1]
    if number in known:
        return f"sm_{number}"
    if older := [each for each in known if each < number]:
        return f"compute_{max(older)}"
    raise NotCompiled("reasons.card_kernels_not_compiled")


@dataclass(frozen=True, slots=True)
class _Unit:
    """One image to be made. file: where it is kept."""

    name: str
    source: str
    options: Sequence[str]
    file: Path


def images(
    folder: Path,
    capability: tuple[int, int],
    nvrtc: Compiler,
    types: Sequence[str],
    seconds: float = _SECONDS,
) -> list[bytes]:
    """All kernels for a card, machine code or PTX, from the cache `folder`, compiled where they are missing.

    types: of TYPES. Several processes may do this at once. Raises NotCompiled; that the cache cannot be
    written is no reason for it.
    """
    headers = {file.name: file.read_text("utf-8") for file in sorted(_SOURCES.glob("*.cuh"))}
    units = list(_units(folder, target(capability, nvrtc.architectures), nvrtc.version, types, headers))
    found = {unit.file: image for unit in units if (image := _read(unit.file)) is not None}
    missing = [unit for unit in units if unit.file not in found]
    for unit, image in zip(missing, _compiled(missing, nvrtc, headers, seconds), strict=True):
        _keep(unit.file, image)
        found[unit.file] = image
    return list(found.values())


def digest() -> str:
    """All sources in a short word."""
    files = sorted(file for file in _SOURCES.iterdir() if file.suffix in (".cu", ".cuh"))
    return _short("\0".join(file.read_text("utf-8") for file in files))


def _units(
    folder: Path, target: str, version: tuple[int, int], types: Sequence[str], headers: Mapping[str, str]
) -> Iterator[_Unit]:
    for path in sorted(_SOURCES.glob("*.cu")):
        source = path.read_text("utf-8")
        for name in types:
            options = [f"--gpu-architecture={target}", *_OPTIONS, *TYPES[name]]
            identity = _short("\0".join([source, *headers.values(), *options, str(version)]))
            yield _Unit(path.name, source, options, folder / f"{path.stem}-{name}-{target}-{identity}.image")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _compiled(
    units: Sequence[_Unit], nvrtc: Compiler, headers: Mapping[str, str], seconds: float
) -> list[bytes]:
    """The units' images, made side by side. What takes too long is left behind, for nothing can end it."""
    end = time.monotonic() + seconds
    started = [
        _started(partial(nvrtc.compile, unit.name, unit.source, headers, unit.options)) for unit in units
    ]
    try:
        return [each.result(max(0.0, end - time.monotonic())) for each in started]
    except NotCompiled:
        raise
    except Exception as error:  # the time is up, or Windows tells of a fault in NVRTC
        _log.debug("NVRTC, after %.0f s of %.0f: %r", seconds + time.monotonic() - end, seconds, error)
        raise NotCompiled("reasons.card_kernels_not_compiled") from error


def _started(work: Callable[[], bytes]) -> Future[bytes]:
    """The work in a thread that keeps no process alive, as those of an executor would."""
    future: Future[bytes] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="nvrtc", daemon=True).start()
    return future


def _read(file: Path) -> bytes | None:
    """A kept image; None where there is none, or a damaged one."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    checksum, image = content[:_CHECKSUM], content[_CHECKSUM:]
    return image if hashlib.sha256(image).digest() == checksum else None


def _keep(file: Path, image: bytes) -> None:
    """Write it as a whole or not at all. Without it, the next start compiles again."""
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(hashlib.sha256(image).digest() + image)
        part.replace(file)
    except OSError as error:
        _log.debug("%s: %s", file, error)
        with suppress(OSError):
            part.unlink()
