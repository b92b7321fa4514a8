"""Slow replies on a full card: noticed, explained, and never blamed on a card without reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmui import notes
from glmui.engine.client import EngineClient
from glmui.memory.spill import (
    FAR_UNDER,
    FILE,
    LEAST_REPLIES,
    MOST_REPLIES,
    Speed,
    SpillWatch,
    listed,
    speed_of,
    usual,
)
from glmui.meter import Meter, User
from glmui.types import Chunk, EngineInfo, EngineSpec, GenerationParams, Message, Usage
from tests.test_meter import FakeNvml

INFO = EngineInfo(
    state="ready", model="m", device="cuda:0", dtype="int4", layers=("cuda:0",) * 28, pid=os.getpid()
)


class Nvml(FakeNvml):
    """Two cards, the first of them as full as it is set."""

    full = 0.99

    def _answer(self, name: str, *arguments: object) -> object:
        answer = super()._answer(name, *arguments)
        if name == "nvmlDeviceGetMemoryInfo" and arguments[0] == 0:
            answer.used = int(self.full * answer.total)
        return answer


def usage(per_second: float, prompt: int = 100, tokens: int = 101) -> Usage:
    return Usage(prompt, tokens, 30.0, 20.0, decode_seconds=(tokens - 1) / per_second)


@pytest.fixture
def nvml() -> Nvml:
    return Nvml()


@pytest.fixture
def watch(nvml: Nvml, tmp_path: Path) -> SpillWatch:
    """One that knows this machine's usual 30 tokens a second."""
    watch = SpillWatch(Meter(nvml), tmp_path, moves_to_ram=True)
    for speed in (29, 30, 31):
        assert watch.remark(INFO, usage(speed)) == ""
    return watch


# Judging


def test_what_is_usual_needs_a_few_replies() -> None:
    past = [Speed(30, 100)] * LEAST_REPLIES
    assert usual(past[1:], 100) is None
    assert usual(past, 100) == 30


def test_an_outlier_does_not_move_it() -> None:
    assert usual([Speed(30, 100), Speed(31, 100), Speed(29, 100), Speed(400, 100)], 100) == 30.5


def test_only_replies_of_alike_context_are_compared() -> None:
    short = [Speed(30, 300)] * 5
    assert usual(short, 601) is None
    assert usual(short, 600) == 30
    assert usual([Speed(12, 4000)] * 5, 600) == 12  # longer ones make a low bar, which is safe


@given(
    st.lists(st.integers(1, 32768), min_size=LEAST_REPLIES, max_size=MOST_REPLIES),
    st.integers(1, 32768),
    st.floats(1e-3, 10),
    st.floats(0, 0.25),
)
def test_a_longer_context_alone_is_never_taken_for_a_spill(
    contexts: list[int], own: int, base: float, growth: float
) -> None:
    """Whatever a token costs at a context of 0, and whatever each token of context adds to that."""

    def speed(context: int) -> float:
        return 1 / (base * (1 + growth * context / 256))

    normal = usual([Speed(speed(context), context) for context in contexts], own)
    assert normal is None or speed(own) > FAR_UNDER * normal


def test_short_replies_say_nothing() -> None:
    assert speed_of(usage(1, tokens=15)) is None
    assert speed_of(usage(1, prompt=1000, tokens=100)) == Speed(pytest.approx(1), 1050)  # type: ignore[arg-type]
    assert speed_of(Usage(10, 40, 1.0, 1.0, decode_seconds=0)) is None


# What is said


def test_a_slow_reply_on_a_full_card_is_explained(watch: SpillWatch) -> None:
    why, who = notes.words(watch.remark(INFO, usage(8)), "en")
    assert all(part in why for part in ("8.0", "30.0", "99%", "Windows", "layers"))
    parent = psutil.Process(os.getppid()).name()
    assert f"{parent} (2.1 GB), glmui (1.1 GB)" in who


def test_elsewhere_than_on_windows_another_program_is_the_likely_cause(nvml: Nvml, tmp_path: Path) -> None:
    watch = SpillWatch(Meter(nvml), tmp_path, moves_to_ram=False)
    for _ in range(LEAST_REPLIES):
        watch.remark(INFO, usage(30))
    (why, _) = notes.words(watch.remark(INFO, usage(8)), "en")
    assert "another program" in why
    assert "Windows" not in why


def test_without_names_the_cause_alone_is_told(watch: SpillWatch, nvml: Nvml) -> None:
    for kind in ("Compute", "Graphics"):
        nvml.answers[f"nvmlDeviceGet{kind}RunningProcesses"] = []
    assert len(notes.words(watch.remark(INFO, usage(8)), "zh")) == 1


def test_names_without_sizes() -> None:
    assert listed([User(1, "game.exe", None), User(2, "python", 3 * 10**9)], 2) == "game.exe, glmui (3.0 GB)"


@pytest.mark.parametrize(
    ("info", "slow"),
    [
        (INFO, usage(13)),  # not far under
        (INFO, usage(8, tokens=15)),  # too short
        (INFO, usage(8, prompt=4000)),  # nothing to compare with
        (replace(INFO, device="cpu"), usage(8)),
        (replace(INFO, model="other"), usage(8)),
        (replace(INFO, layers=("cuda:0",) * 14 + ("cpu",) * 14), usage(8)),
    ],
)
def test_nothing_is_said_of_others(watch: SpillWatch, info: EngineInfo, slow: Usage) -> None:
    assert watch.remark(info, slow) == ""


def test_nothing_is_said_where_the_card_has_room(watch: SpillWatch, nvml: Nvml) -> None:
    nvml.full = 0.9
    assert watch.remark(INFO, usage(8)) == ""


def test_a_full_card_that_the_model_is_not_on_is_not_blamed(
    watch: SpillWatch, nvml: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program fills the first of two cards; the model is on the second, slow for another reason."""
    second = replace(INFO, device="cuda:1", layers=("cuda:1",) * 28)
    for _ in range(LEAST_REPLIES):
        watch.remark(second, usage(30))
    assert watch.remark(second, usage(8)) == ""
    mixed = replace(INFO, device="mixed", layers=("cuda:1",) * 20 + ("cpu",) * 8)
    for _ in range(LEAST_REPLIES):
        watch.remark(mixed, usage(30))
    assert watch.remark(mixed, usage(8)) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")  # now torch's second is NVML's first
    assert watch.remark(second, usage(8))
    assert watch.remark(INFO, usage(8)) == ""


def test_nothing_is_said_where_nothing_can_be_read(watch: SpillWatch, nvml: Nvml) -> None:
    nvml.answers["nvmlDeviceGetCount"] = None
    assert watch.remark(INFO, usage(8)) == ""


# What is remembered


def test_spilling_for_long_does_not_become_usual(watch: SpillWatch) -> None:
    for _ in range(2 * MOST_REPLIES):
        assert watch.remark(INFO, usage(8))


def test_a_machine_that_has_become_slower_for_another_reason_does(watch: SpillWatch, nvml: Nvml) -> None:
    nvml.full = 0.5
    for _ in range(MOST_REPLIES):
        watch.remark(INFO, usage(8))
    nvml.full = 0.99
    assert watch.remark(INFO, usage(8)) == ""


def test_it_is_known_after_a_restart(watch: SpillWatch, nvml: Nvml, tmp_path: Path) -> None:
    assert SpillWatch(Meter(nvml), tmp_path).remark(INFO, usage(8))
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"m": 3}', '{"m": [["a", 1]]}', "\xff"])
def test_a_damaged_file_is_begun_anew(content: str, nvml: Nvml, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content, encoding="latin-1")
    watch = SpillWatch(Meter(nvml), tmp_path)
    for _ in range(LEAST_REPLIES):
        assert watch.remark(INFO, usage(30)) == ""
    assert watch.remark(INFO, usage(8))


def test_a_disk_that_refuses_costs_the_memory_alone(nvml: Nvml, tmp_path: Path) -> None:
    watch = SpillWatch(Meter(nvml), tmp_path / "no such folder")
    for _ in range(LEAST_REPLIES):
        assert watch.remark(INFO, usage(30)) == ""
    assert watch.remark(INFO, usage(8))


def test_only_so_many_models_are_remembered(watch: SpillWatch, tmp_path: Path) -> None:
    for number in range(40):
        watch.remark(replace(INFO, model=f"m{number}"), usage(30))
    assert len(watch._speeds._all()) == 32
    assert watch.remark(INFO, usage(8)) == ""


# Through the engine's client


@pytest.fixture
def client(nvml: Nvml, tmp_path: Path) -> Iterator[EngineClient]:
    remark = SpillWatch(Meter(nvml), tmp_path, moves_to_ram=True).remark
    client = EngineClient(EngineSpec("echo", "echo", device="cuda"), remark=remark)
    yield client
    client.close()


def test_a_reply_that_crawled_says_why(client: EngineClient) -> None:
    def note(speed: int) -> str:
        asked = [Message("user", f"/echo tokens=16 speed={speed}")]
        *_, last = client.stream_chat(asked, GenerationParams(), f"{speed}")
        assert isinstance(last, Chunk)
        return last.note

    assert [note(speed) for speed in (200, 201, 202)] == ["", "", ""]
    assert note(30).startswith("spill_to_ram ")
