"""The meter shows what can be known and never raises, whatever NVML does."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from glmui.meter import Card, Meter, User

GiB = 2**30
CODES = sorted(pynvml.NVMLError._valClassMapping)
CALLS = [
    "nvmlInit",
    "nvmlDeviceGetCount",
    "nvmlDeviceGetHandleByIndex",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetName",
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
    "nvmlShutdown",
]


class FakeNvml:
    """Two cards; `failing` maps a call to what it raises, `answers` to what it returns instead."""

    def __init__(self) -> None:
        self.failing: dict[str, BaseException] = {}
        self.answers: dict[str, Any] = {}
        self.calls: list[str] = []
        self.lost: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        if name not in CALLS:
            raise AttributeError(name)
        return lambda *arguments: self._answer(name, *arguments)

    def _answer(self, name: str, *arguments: Any) -> Any:
        self.calls.append(name)
        if name in self.failing:
            raise self.failing[name]
        if name in self.answers:
            return self.answers[name]
        if arguments and arguments[0] in self.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return {
            "nvmlDeviceGetCount": 2,
            "nvmlDeviceGetHandleByIndex": arguments[0] if arguments else None,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=2 * GiB, total=6 * GiB),
            "nvmlDeviceGetName": "A card",
            "nvmlDeviceGetComputeRunningProcesses": [
                SimpleNamespace(pid=1, usedGpuMemory=GiB // 4),
                SimpleNamespace(pid=os.getpid(), usedGpuMemory=GiB),
            ],
            "nvmlDeviceGetGraphicsRunningProcesses": [
                SimpleNamespace(pid=os.getpid(), usedGpuMemory=None),
                SimpleNamespace(pid=os.getppid(), usedGpuMemory=2 * GiB),
            ],
        }.get(name)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_cards_with_the_engines_share():
    reading = Meter(FakeNvml()).read(os.getpid())
    assert reading.cards == (
        Card(0, "A card", 2 * GiB, 6 * GiB, GiB),
        Card(1, "A card", 2 * GiB, 6 * GiB, GiB),
    )
    assert reading.gpu_error == ""


def test_ram_and_the_engines_rss():
    reading = Meter(FakeNvml()).read(os.getpid())
    assert reading.ram_used is not None
    assert reading.ram_total is not None
    assert 0 < reading.ram_used < reading.ram_total
    assert reading.engine_rss is not None
    assert 1 << 20 < reading.engine_rss < reading.ram_total
    assert reading.engine_private is not None
    assert 1 << 20 < reading.engine_private <= reading.engine_rss, "what is mapped is not counted"


@pytest.mark.parametrize("pid", [None, 2**30, -1, 10**30])
def test_an_engine_that_is_not_there(pid: int | None):
    reading = Meter(FakeNvml()).read(pid)
    assert reading.engine_rss is None
    assert reading.engine_private is None
    assert [card.own for card in reading.cards] == [None, None]
    assert reading.gpu_error == ""


def test_nvml_has_error_codes_to_try():
    assert len(CODES) > 25


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", CODES)
def test_no_error_code_of_any_call_gets_through(call: str, code: int):
    nvml, clock = FakeNvml(), Clock()
    nvml.failing[call] = pynvml.NVMLError(code)
    meter = Meter(nvml, clock)
    for _ in range(3):
        reading = meter.read(os.getpid())
        assert reading.ram_total
        meter.users(0)
        clock.now += 100
    meter.close()
    if call in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo"):
        assert reading.gpu_error == "unknown"
        assert all(card.used is None and card.total is None for card in reading.cards)
    if call == "nvmlInit":
        missing = code in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        assert reading.gpu_error == ("no_driver" if missing else "unknown")
        assert reading.cards == ()


@pytest.mark.parametrize("error", [OSError("gone"), ImportError("no pynvml"), ValueError(), RecursionError()])
@pytest.mark.parametrize("call", CALLS)
def test_no_other_error_gets_through(call: str, error: Exception):
    nvml = FakeNvml()
    nvml.failing[call] = error
    meter = Meter(nvml)
    meter.read(os.getpid())
    meter.users(0)
    meter.close()


@pytest.mark.parametrize("odd", [None, b"bytes \xff", "text", -1, True, 1.5, [], object()])
@pytest.mark.parametrize("call", CALLS)
def test_odd_answers_are_taken_as_unknown(call: str, odd: Any):
    nvml = FakeNvml()
    nvml.answers[call] = odd
    meter = Meter(nvml)
    assert all(user.name for user in meter.users(0))
    for card in meter.read(os.getpid()).cards:
        assert isinstance(card.name, str)
        assert card.used in (None, 2 * GiB)
        assert card.own in (None, GiB)


def test_names_in_bytes_are_read():
    nvml = FakeNvml()
    nvml.answers["nvmlDeviceGetName"] = b"NVIDIA GeForce"
    assert Meter(nvml).read(None).cards[0].name == "NVIDIA GeForce"


def test_memory_of_processes_windows_does_not_tell():
    nvml = FakeNvml()
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = [
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)
    ]
    reading = Meter(nvml).read(os.getpid())
    assert reading.cards[0].own is None
    assert reading.gpu_error == ""


def test_the_biggest_users_by_name_each_once():
    mine, parents = psutil.Process().name(), psutil.Process(os.getppid()).name()
    users = Meter(FakeNvml()).users(0)
    assert users[:2] == (User(os.getppid(), parents, 2 * GiB), User(os.getpid(), mine, GiB))
    assert len(Meter(FakeNvml()).users(0, most=1)) == 1


def test_users_whose_share_windows_does_not_tell_are_named():
    nvml = FakeNvml()
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = []
    nvml.answers["nvmlDeviceGetGraphicsRunningProcesses"] = [
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)
    ]
    assert Meter(nvml).users(0) == (User(os.getpid(), psutil.Process().name(), None),)


def test_users_that_are_gone_or_of_a_lost_card_are_left_out():
    nvml = FakeNvml()
    nvml.answers["nvmlDeviceGetGraphicsRunningProcesses"] = [SimpleNamespace(pid=2**30, usedGpuMemory=GiB)]
    assert 2**30 not in [user.pid for user in Meter(nvml).users(0)]
    lost = FakeNvml()
    lost.lost.add(1)
    assert Meter(lost).users(1) == ()


def test_a_card_that_vanishes_leaves_the_other_and_comes_back():
    nvml, clock = FakeNvml(), Clock()
    meter = Meter(nvml, clock)
    meter.read(None)
    nvml.lost.add(1)
    reading = meter.read(None)
    assert [card.used for card in reading.cards] == [2 * GiB, None]
    assert reading.gpu_error == "unknown"
    nvml.lost.clear()
    assert meter.read(None).gpu_error == ""


def test_a_failing_driver_is_started_anew_only_once_a_minute():
    nvml, clock = FakeNvml(), Clock()
    nvml.failing["nvmlInit"] = pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    meter = Meter(nvml, clock)
    for _ in range(60):
        assert meter.read(None).gpu_error == "no_driver"
        clock.now += 2
    assert nvml.calls.count("nvmlInit") == 2
    nvml.failing.clear()
    clock.now += 60
    assert len(meter.read(None).cards) == 2


def test_a_lost_session_is_renewed_and_let_go_first():
    nvml, clock = FakeNvml(), Clock()
    meter = Meter(nvml, clock)
    meter.read(None)
    nvml.failing["nvmlDeviceGetCount"] = pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
    for _ in range(60):
        meter.read(None)
        clock.now += 2
    assert 2 <= nvml.calls.count("nvmlInit") <= 3
    assert nvml.calls.count("nvmlShutdown") == nvml.calls.count("nvmlInit") - 1


def test_reading_after_close_and_from_many_threads():
    nvml = FakeNvml()
    meter = Meter(nvml)
    meter.close()
    readings: list[Any] = []
    threads = [threading.Thread(target=lambda: readings.append(meter.read(os.getpid()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({reading.cards for reading in readings}) == 1
    assert nvml.calls.count("nvmlInit") == 1


def test_the_real_driver_or_none_is_read_cheaply():
    meter = Meter()
    meter.read(os.getpid())
    begun = time.process_time()
    for _ in range(20):
        reading = meter.read(os.getpid())
    assert (time.process_time() - begun) / 20 < 0.02
    assert reading.gpu_error in ("", "no_driver", "unknown")
    meter.close()
