"""How a process gives up what it does not need: memory, time, network, programs, files to write.

Linux: resource limits, a network namespace of its own where that is permitted, and Landlock, which binds
even code that got past Python. Everywhere: an audit hook, which binds Python code only.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000  # of unshare(2)
_NO_NEW_PRIVILEGES = 38  # of prctl(2)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls, the same on every processor
_BENEATH = 1  # a rule about a folder

# Landlock's rights by the version that brought them. Not among them, so free everywhere: reading.
_EXECUTE = 1
_CHANGE = 1 << 1 | sum(1 << bit for bit in range(4, 13))  # write, remove, make
_CHANGE_SINCE = {2: 1 << 13, 3: 1 << 14}  # to link and to rename across folders; to truncate
_NETWORK_SINCE, _TCP = 4, 3  # bind and connect

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile",
    "pty.", "urllib.", "ftplib.", "http.", "smtplib.", "_winapi.", "webbrowser.",
)  # fmt: skip
_CHANGES = {
    "os.chmod": 1, "os.chown": 1, "os.link": 2, "os.mkdir": 1, "os.remove": 1, "os.rename": 2, "os.rmdir": 1,
    "os.symlink": 2, "os.truncate": 1,
}  # fmt: skip


def confine(writes: Path, memory: int, cpu_seconds: int, file_size: int) -> None:
    """Bind this process for good. To be called while it has one thread: others would stay free.

    writes: the one folder to write into. memory: bytes; of mapped files those count that could be changed
    in memory. file_size: bytes. What a system does not offer is passed over.
    """
    sys.dont_write_bytecode = True
    tempfile.tempdir = os.environ["TMPDIR"] = str(writes)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library of another kind
            libc = ctypes.CDLL(None, use_errno=True)
            libc.unshare(_NEW_NETWORK) == 0 or libc.unshare(_NEW_USER | _NEW_NETWORK)
            _landlock(libc, writes)
    if sys.platform != "win32":
        _limit(memory, cpu_seconds, file_size)
    sys.addaudithook(_hook(os.path.realpath(writes)))


def _limit(memory: int, cpu_seconds: int, file_size: int) -> None:
    import resource

    bounds = {
        resource.RLIMIT_DATA: memory,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_CORE: 0,
    }
    for kind, bound in bounds.items():
        # Past the first bound of time comes SIGXCPU, past the second SIGKILL, which says less.
        last = bound + 5 if kind == resource.RLIMIT_CPU else bound
        with suppress(OSError, ValueError):  # lower already
            resource.setrlimit(kind, (bound, last))
    with suppress(OSError):
        os.nice(10)


def stop_making_threads() -> None:
    """From now on neither threads nor processes can be made (not enforced for an administrator)."""
    if sys.platform != "win32":
        import resource

        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _landlock(libc: Any, writes: Path) -> None:
    """No program started, nothing written or removed outside `writes`, no TCP: held by the kernel."""
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    change = _CHANGE | sum(right for since, right in _CHANGE_SINCE.items() if version >= since)
    handled = struct.pack("=QQ", _EXECUTE | change, _TCP if version >= _NETWORK_SINCE else 0)
    size = len(handled) if version >= _NETWORK_SINCE else 8
    ruleset = libc.syscall(_CREATE_RULESET, handled, size, 0)
    folder = os.open(writes, os.O_PATH | os.O_CLOEXEC)  # type: ignore[attr-defined,unused-ignore]
    libc.syscall(_ADD_RULE, ruleset, _BENEATH, struct.pack("=Qi", change, folder), 0)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(folder)
    os.close(ruleset)


def _hook(writes: str) -> Any:
    def check(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & _WRITING and not isinstance(path, int):
                _must_be_inside(path)
        elif event in _CHANGES:
            for path in args[: _CHANGES[event]]:
                _must_be_inside(path)
        elif event.startswith(_REFUSED):
            raise PermissionError(f"not here: {event}")

    def _must_be_inside(path: Any) -> None:
        real = os.path.realpath(os.fsdecode(path))
        if real != writes and not real.startswith(writes + os.sep):
            raise PermissionError(f"not to be written here: {real}")

    return check
