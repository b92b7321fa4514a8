from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest

from glmui.errors import EngineError, StoreError, to_values
from glmui.i18n import Words
from glmui.jobs import Job
from glmui.meter import Card, Reading
from glmui.store import Conversation, StoredMessage
from glmui.types import Chunk, EngineInfo, Progress, Usage
from glmui.ui import present

EN, ZH = Words("en"), Words("zh")
REPLY = StoredMessage(
    id=2, conversation_id="c", parent_id=1, role="assistant", content="answer", state="done",
    finish_reason="stop", error=None, note="", left_out=0, usage=Usage(10, 20, 3.0, 1.0, 1.9),
    model="echo", created_at=0.0, version=1, versions=1,
)  # fmt: skip


def words(markup: str) -> str:
    return re.sub(r"<[^>]*>", " ", markup)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"state": "stopped", "finish_reason": "cancelled"}, ["stopped"]),
        ({"state": "interrupted", "finish_reason": "interrupted"}, ["interrupted"]),
        ({"finish_reason": "length"}, ["max_length"]),
        ({"note": "repetition"}, ["over and over"]),
        (
            {"note": 'repetition\nmemory_context {"tokens": 512}\nspill_users {"users": "a (1 GB)"}'},
            ["over and over", "512 tokens", "a (1 GB)"],
        ),
        ({"left_out": 3}, ["3 earlier rounds"]),
        ({"state": "error", "error": to_values(EngineError("out_of_memory"))}, ["Memory ran out"]),
        ({"left_out": 2, "state": "stopped"}, ["2 earlier rounds", "stopped"]),
    ],
)
def test_a_reply_says_how_it_ended(change: dict[str, object], said: list[str]) -> None:
    notes = present.footnotes(replace(REPLY, **change), EN)  # type: ignore[arg-type]
    assert len(notes) == len(said)
    for note, expected in zip(notes, said, strict=True):
        assert expected in note


def test_the_growing_reply_is_taken_from_its_job_and_tells_of_a_full_disk() -> None:
    job = Job(REPLY.id, "c", "tab", content="so far <b>")
    job.save_error = StoreError("disk_full")
    (shown,) = present.thread([replace(REPLY, content="old")], job, EN)
    assert shown["content"].startswith("so far &#60;b>")
    assert "disk" in shown["content"]


def test_the_status_tells_each_stage() -> None:
    job = Job(1, "c", "tab")
    assert "2 before" in present.status(job, 2, None, EN)
    job.show(Progress("loading", 0.4))
    assert "40%" in present.status(job, 0, None, EN)
    job.take(Chunk(text="word", tokens=1))
    assert "1 tokens" in present.status(job, 0, None, EN)
    assert "10 + 20 tokens · 10.0 tokens/s" in present.status(None, 0, REPLY, EN)
    assert words(present.status(None, 0, None, EN)).strip() == ""


@pytest.mark.parametrize(("used", "level"), [(50, "calm"), (85, "warn"), (95, "full")])
def test_the_meter_turns_at_85_and_95_percent(used: int, level: str) -> None:
    card = Card(0, "Card <0>", used * 10**9, 100 * 10**9, 10**9)
    shown = present.meter(Reading((card,), 1, 2, None, ""), EN)
    assert f'class="bar {level}"' in shown
    assert "Card &lt;0&gt;" in shown
    assert f"{used}.0 GB / 100.0 GB · model 1.0 GB" in words(shown)


def test_a_meter_that_knows_nothing_says_so() -> None:
    shown = words(present.meter(Reading((), None, None, None, "unknown"), EN))
    assert "unknown" in shown
    assert "None" not in shown


def test_times_are_said_as_people_say_them() -> None:
    now = time.mktime((2026, 3, 10, 12, 0, 0, 0, 0, -1))
    at = [
        time.mktime((*day, 9, 5, 0, 0, 0, -1))
        for day in ((2026, 3, 10), (2026, 3, 9), (2026, 1, 2), (2025, 1, 2))
    ]
    assert [present.when(t, EN, now) for t in at] == ["09:05", "yesterday", "01-02", "2025-01-02"]


def test_a_title_is_text_whatever_it_holds() -> None:
    row = Conversation("id", "<img onerror=x> ${1} `", True, 0.0, time.time(), None, {}, None)
    shown = present.conversations([row, replace(row, id="x", title="")], "id", "", ZH)
    assert "<img" not in shown
    assert "&lt;img onerror=x&gt; ${1} `" in shown
    assert shown.count("aria-current") == 1
    assert "新对话" in shown
    assert "还没有对话" in present.conversations([], "", "", ZH)


def test_versions_are_shown_where_there_are_several() -> None:
    assert present.versions(REPLY, EN) == ""
    assert "2 / 3" in present.versions(replace(REPLY, version=2, versions=3), EN)


def test_a_model_that_memory_has_cut_down_shows_it() -> None:
    chip = present.engine(EngineInfo(state="ready", reason="reasons.memory_cpu"), "m", 0, EN)
    assert "free the card" in chip.partition("<p")[2]


def test_the_chip_names_model_state_and_reason() -> None:
    info = EngineInfo(state="ready", device="cpu", dtype="float32", reason="reasons.cpu_float32")
    chip = present.engine(info, "/models/my <model>", 0, EN)
    assert "my &lt;model&gt; · cpu" in chip
    assert "float32" in chip
    assert "<p" not in chip
    assert "avx2" in present.engine(replace(info, kernel="avx2"), "starter", 0, EN)
    slow = present.engine(replace(info, reason="reasons.kernels_no_compiler"), "starter", 0, EN)
    assert '<p class="slow">No C compiler was found' in slow, "to be read without pointing at anything"
    assert "asleep" in present.engine(EngineInfo(), "starter", 0, EN)
    assert "takes no memory now" in present.engine(EngineInfo(), "starter", 0, EN)
    on_card = replace(info, device="mixed", kernel="sm_86, avx2", reason="reasons.chatglm_mixed")
    shared = present.engine(on_card, "starter", 0, EN, idle_minutes=30)
    for told in ("GPU and CPU together", "for this card (sm_86)", "(avx2)", "After 30 idle minutes"):
        assert told in shared
    slow = present.engine(replace(info, reason="reasons.card_kernels_wrong"), "starter", 0, EN)
    assert '<p class="slow">' in slow
    assert "No model" in present.engine(EngineInfo(), "", 0, EN)


def test_a_line_is_drawn_where_the_model_begins_to_see() -> None:
    asked = replace(REPLY, id=1, role="user", content="question")
    thread = [asked, REPLY, asked, REPLY, asked]

    def line(seen: int | None, shown: list[StoredMessage] = thread) -> list[int]:
        messages = present.thread(shown, None, EN, seen)
        return [place for place, message in enumerate(messages) if "sees from here" in message["content"]]

    assert line(None) == []
    assert line(2) == [1], "above the second question"
    assert line(1) == [3]
    assert line(0) == [4], "below everything"
    assert line(3) == [], "everything shown is seen"
    assert line(7) == []
    assert line(1, thread[1:]) == [2]
