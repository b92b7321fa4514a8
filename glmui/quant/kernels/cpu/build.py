"""Compiling the C kernels on the user's own machine, once for each version of them and each processor.

The library is kept in a cache folder; its name tells the sources, the processor and the compiler. What a
compiler prints is for the debug log only: a reader learns the outcome, as a key of the locales' "reasons".
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

_log = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent
_SECONDS = 400  # seconds as a rule; zig on Windows compiles its C library first
_WINDOWS = sys.platform == "win32"
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_FLAGS = ["-O3", "-std=gnu11", "-shared", *([] if _WINDOWS else ["-fPIC", "-fvisibility=hidden", "-pthread"])]


class NotBuilt(Exception):
    """No library: the one argument is the reason, a key of the locales' "reasons"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Compiler:
    """command: how it is started, with its own flags. identity: changes when another version is put there."""

    command: Sequence[str]
    identity: str
    environment: Mapping[str, str] = field(default_factory=dict)  # names of folders inside the build folder


def compilers() -> list[Compiler]:
    """The C compilers of this machine, best first, then ziglang if it is installed."""
    found = [
        Compiler([path], f"{path} {os.stat(path).st_size} {os.stat(path).st_mtime_ns}") for path in _paths()
    ]
    if importlib.util.find_spec("ziglang"):
        # zig would compile for this very processor; baseline leaves the choice to run time, as elsewhere.
        zig = [sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline"]
        folders = {"ZIG_GLOBAL_CACHE_DIR": "zig", "ZIG_LOCAL_CACHE_DIR": "zig"}
        found.append(Compiler(zig, f"ziglang {version('ziglang')}", folders))
    return found


def _paths() -> Iterator[str]:
    if sys.platform == "darwin" and not _run(["xcode-select", "-p"], Path(), {}, 10):
        return  # /usr/bin/cc would open a window that asks to install Apple's tools
    # gcc for Windows keeps the stack at 16 bytes, which AVX registers saved there do not survive.
    for name in ("clang",) if _WINDOWS else ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            yield path


def build(folder: Path, candidates: Sequence[Compiler]) -> Path:
    """The library for this processor out of the cache `folder`, compiled first where it is not there.

    Several processes may do this at once: each compiles in its own folder, and the finished file is moved
    into place. Raises NotBuilt.
    """
    stem = f"kernels-{_digest(*(_SOURCES / name for name in _names()))}"
    wanted = [folder / f"{stem}-{_short(c.identity)}{_SUFFIX}" for c in candidates]
    for file in [*wanted, *sorted(folder.glob(f"{stem}-*{_SUFFIX}"))]:  # made by a compiler now gone, too
        if file.is_file():
            return file
    if not candidates:
        raise NotBuilt("reasons.kernels_no_compiler")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for compiler, file in zip(candidates, wanted, strict=True):
            if _compile(compiler, folder, file):
                return file
    except OSError as error:
        _log.debug("kernels: %s", error)
        raise NotBuilt("reasons.kernels_no_room") from error
    raise NotBuilt("reasons.kernels_not_built")


def _compile(compiler: Compiler, folder: Path, file: Path) -> bool:
    """Compile in a folder of its own, with plain names only: some compilers cannot read every path."""
    place = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        for name in _names():
            shutil.copyfile(_SOURCES / name, place / name)
        environment = {name: str(place / inner) for name, inner in compiler.environment.items()}
        command = [*compiler.command, *_FLAGS, "-o", f"library{_SUFFIX}", "kernels.c"]
        if not _run(command, place, environment, _SECONDS) or not (place / f"library{_SUFFIX}").is_file():
            return False
        _move(place / f"library{_SUFFIX}", file)
        return True
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _move(built: Path, file: Path) -> None:
    try:
        built.replace(file)
    except OSError:
        if not file.is_file():  # else another process was first, and Windows keeps what it has opened
            raise


def _run(command: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float) -> bool:
    """Whether the command ended well in time. It neither reads nor writes any of our streams."""
    try:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **environment}, timeout=seconds, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.debug("%s: %s", command[0], error)
        return False
    if done.returncode:
        _log.debug("%s: %s", command[0], done.stdout[-2000:].decode("utf-8", "replace"))
    return done.returncode == 0


def _names() -> list[str]:
    return sorted(file.name for file in _SOURCES.iterdir() if file.suffix in (".c", ".h"))


def _digest(*files: Path) -> str:
    """The sources, the flags and the processor in one short word."""
    return _short("\0".join([*(file.read_text("utf-8") for file in files), *_FLAGS, _processor()]))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _processor() -> str:
    """What tells this processor's abilities from another's, as far as the system says."""
    words = [sys.platform, platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return " ".join(words)
    return " ".join(
        [*words, *sorted({line for line in lines if line.lower().startswith(("flags", "features"))})]
    )
