"""Why a process was killed, as far as it can be known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from glmui.memory import witness
from glmui.memory.witness import Witness, count_kills

KILLED = -9


def machine(monkeypatch: pytest.MonkeyPatch, free: float, swap_free: float = 0.0, swap: int = 0) -> None:
    """A machine of which these parts are free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100, available=100 * free))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=swap, free=swap * swap_free))


def test_the_kernel_counted_a_kill() -> None:
    counts = iter([3, 4])
    assert Witness(lambda: next(counts)).memory_ran_out(KILLED)


def test_a_kill_before_the_last_look_was_another_program() -> None:
    counts = iter([3, 4, 4])
    seen = Witness(lambda: next(counts))
    seen.look()
    assert not seen.memory_ran_out(KILLED)


@pytest.mark.parametrize("count", [3, None])
def test_somebody_killed_it(count: int | None) -> None:
    assert not Witness(lambda: count).memory_ran_out(KILLED)


@pytest.mark.parametrize("exit_code", [0, 3, -11, -15, None])
def test_other_ends_have_other_causes(exit_code: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, free=0.0)
    counts = iter([3, 3, 4])
    seen = Witness(lambda: next(counts))
    seen.look()
    assert not seen.memory_ran_out(exit_code)


@pytest.mark.parametrize("exit_code", [0xC0000017, 0xC000012D])
def test_windows_says_it_in_the_exit_code(exit_code: int) -> None:
    assert Witness(lambda: None).memory_ran_out(exit_code)


@pytest.mark.parametrize(
    ("free", "swap", "swap_free", "ran_out"),
    [(0.03, 0, 0.0, True), (0.3, 0, 0.0, False), (0.03, 100, 0.5, False), (0.03, 100, 0.02, True)],
)
def test_nothing_was_left_when_it_was_last_looked(
    free: float, swap: int, swap_free: float, ran_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, free, swap_free, swap)
    seen = Witness(lambda: None)
    assert not seen.memory_ran_out(KILLED)
    seen.look()
    assert seen.memory_ran_out(KILLED) is ran_out


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def test_our_own_group_is_asked_first(tmp_path: Path) -> None:
    assert count_kills(tmp_path) is None
    write(tmp_path / "proc/vmstat", "nr_free_pages 5\noom_kill 9\n")
    assert count_kills(tmp_path) == 9
    write(tmp_path / "proc/self/cgroup", "0::/user.slice/app.scope\n")
    assert count_kills(tmp_path) == 9  # that group does not tell
    write(
        tmp_path / "sys/fs/cgroup/user.slice/app.scope/memory.events", "oom 2\noom_kill 1\noom_group_kill 0\n"
    )
    assert count_kills(tmp_path) == 1


def test_groups_of_the_older_kind(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "4:cpu,memory:/docker/abc\n2:pids:/\n")
    write(
        tmp_path / "sys/fs/cgroup/memory/docker/abc/memory.oom_control",
        "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    )
    assert count_kills(tmp_path) == 2


def test_this_machine_is_asked_without_an_error() -> None:
    assert witness.is_scarce() in (True, False)
    assert (count_kills() or 0) >= 0
