"""A function in a process that can do little: what it cannot do, and how its end is told."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from glmui.confined import Ended, Limits, run
from glmui.errors import ModelError

linux = pytest.mark.skipif(sys.platform != "linux", reason="the system's own bounds are Linux's")


def never() -> bool:
    return False


def limits(folder: Path, **changes: Any) -> Limits:
    usual = {"writes": folder, "memory": 400_000_000, "mapped": 0, "cpu_seconds": 20, "file_size": 1_000_000}
    return Limits(**{**usual, **changes})


def told_by(
    work: Callable[..., None], folder: Path, *args: Any, cancelled: Callable[[], bool] = never, **changes: Any
) -> list[tuple[Any, ...]]:
    told: list[tuple[Any, ...]] = []
    run(work, args, limits(folder, **changes), lambda *values: told.append(values), cancelled)
    return told


def ended(work: Callable[..., None], folder: Path, *args: Any, **changes: Any) -> str:
    with pytest.raises(Ended) as caught:
        told_by(work, folder, *args, **changes)
    return caught.value.reason


# What runs in that process


def outcome(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:
        return type(error).__name__
    return "done"


def try_everything(tell: Callable[..., None], folder: str, outside: str) -> None:
    inside = os.path.join(folder, "inside")
    tell("write inside", outcome(lambda: Path(inside).write_text("x")))
    tell("write outside", outcome(lambda: Path(outside).write_text("x")))
    tell("link out", outcome(lambda: os.symlink(outside, os.path.join(folder, "link"))))
    tell("remove outside", outcome(lambda: os.remove(outside)))
    tell("rename out", outcome(lambda: os.rename(inside, outside)))
    tell("program", outcome(lambda: subprocess.run(["true"], check=True)))
    tell("shell", outcome(lambda: os.system("true")))
    tell("fork", outcome(os.fork))
    tell("socket", outcome(socket.socket))
    tell("too long a file", outcome(lambda: Path(inside).write_bytes(bytes(2_000_000))))


def past_python(tell: Callable[..., None], folder: str, outside: str, port: int) -> None:
    """The same by the C library, where no hook of Python looks."""
    libc = ctypes.CDLL(None, use_errno=True)
    tell("shell", libc.system(f"touch {outside}".encode()) != 0)
    tell("write", libc.open(outside.encode(), os.O_CREAT | os.O_WRONLY, 0o600) < 0)
    handle = libc.socket(socket.AF_INET, socket.SOCK_STREAM, 0)
    address = b"\x02\0" + port.to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
    tell("connect", handle < 0 or libc.connect(handle, address, 16) != 0)


def take_memory(tell: Callable[..., None], step: int) -> None:
    held = []
    while True:
        held.append(bytearray(os.urandom(1 << 16)) * (step >> 16))


def spin(tell: Callable[..., None]) -> None:
    while True:
        pass


def kill_oneself(tell: Callable[..., None], number: int) -> None:
    os.kill(os.getpid(), number)


def go_wrong(tell: Callable[..., None]) -> None:
    raise RuntimeError("unforeseen")


def refuse(tell: Callable[..., None]) -> None:
    raise ModelError("model_file_cut", folder="a", file="b")


def say_too_much(tell: Callable[..., None]) -> None:
    tell("x" * 1_000_000)


def say_who(tell: Callable[..., None]) -> None:
    tell(os.getpid())
    time.sleep(60)


def test_what_it_cannot_do(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("as it was")
    told = dict(told_by(try_everything, folder, str(folder), str(outside)))
    refused = "PermissionError"
    assert told == {
        "write inside": "done",
        "write outside": refused,
        "link out": refused,
        "remove outside": refused,
        "rename out": refused,
        "program": refused,
        "shell": refused,
        "fork": refused,
        "socket": refused,
        "too long a file": "OSError" if sys.platform != "win32" else "done",
    }
    assert outside.read_text() == "as it was"


@linux
def test_nor_past_python(tmp_path: Path) -> None:
    """Needs a kernel with Landlock; the network is another one even on older kernels."""
    if ctypes.CDLL(None).syscall(444, None, 0, 1) < 1:
        pytest.skip("no Landlock")
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        told = dict(told_by(past_python, folder, str(folder), str(outside), port))
    assert told == {"shell": True, "write": True, "connect": True}
    assert not outside.exists()


@linux
@pytest.mark.parametrize("step", [1 << 22, 1 << 30])
def test_memory_is_bounded(tmp_path: Path, step: int) -> None:
    assert ended(take_memory, tmp_path, step) == "memory"


@linux
def test_time_is_bounded(tmp_path: Path) -> None:
    assert ended(spin, tmp_path, cpu_seconds=1) == "time"


@linux
@pytest.mark.parametrize(("number", "reason"), [(signal.SIGSEGV, "died"), (signal.SIGKILL, "memory")])
def test_how_it_died(tmp_path: Path, number: int, reason: str) -> None:
    assert ended(kill_oneself, tmp_path, int(number)) == reason


def test_what_went_wrong(tmp_path: Path) -> None:
    with pytest.raises(Ended) as caught:
        told_by(go_wrong, tmp_path)
    assert "unforeseen" in caught.value.detail
    with pytest.raises(ModelError) as refused:
        told_by(refuse, tmp_path)
    assert refused.value.code == "model_file_cut"


def test_it_cannot_flood_the_other_side(tmp_path: Path) -> None:
    assert ended(say_too_much, tmp_path) == "died"


def test_cancelled_and_gone(tmp_path: Path) -> None:
    told: list[int] = []
    with pytest.raises(Ended) as caught:
        run(say_who, (), limits(tmp_path), told.append, lambda: bool(told))
    assert caught.value.reason == "cancelled"
    assert not psutil.pid_exists(told[0])
