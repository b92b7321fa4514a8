from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmui import notes
from glmui.chat import ChatService
from glmui.engine.client import EngineClient
from glmui.errors import Busy, InvalidInput, ModelError, StoreError
from glmui.store import Store
from glmui.text import pieces
from glmui.types import ChatSettings, GenerationParams
from tests.small_world import ECHO, World, wait_for


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.service.close()


def test_a_message_is_on_disk_before_it_is_answered_and_the_reply_follows(world: World) -> None:
    here = world.conversation()
    reply = world.service.send(here, "hello there")
    asked, answer = world.store.thread(here)
    assert (asked.role, asked.content) == ("user", "hello there")
    assert (answer.id, answer.role) == (reply.id, "assistant")
    answer = world.answer(here)
    assert answer.content == "You said: hello there"
    assert (answer.state, answer.finish_reason) == ("done", "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_the_engine_sees_system_text_and_earlier_rounds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    stream = world.engine.stream_chat
    monkeypatch.setattr(
        world.engine, "stream_chat", lambda m, p, r: seen.append((list(m), p)) or stream(m, p, r)
    )
    here = world.conversation(ChatSettings(GenerationParams(temperature=0.5), system="Be brief."))
    for text in ("one", "two"):
        world.service.send(here, text)
        world.answer(here)
    messages, params = seen[-1]
    assert [(m.role, m.content) for m in messages] == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "You said: one"),
        ("user", "two"),
    ]
    assert params.temperature == 0.5


def test_stop_keeps_what_was_written(world: World) -> None:
    here = world.conversation()
    world.service.send(here, "/echo tokens=1000 speed=50")
    wait_for(lambda: (job := world.service.live(here)) and job.tokens > 3)
    world.service.stop(here)
    answer = world.answer(here)
    assert (answer.state, answer.finish_reason) == ("stopped", "cancelled")
    assert answer.content.startswith("word word")


def test_stop_of_a_queued_reply_leaves_the_running_one_alone(world: World) -> None:
    first, second = world.conversation(), world.conversation()
    world.service.send(first, "/echo tokens=1000 speed=50")
    world.service.send(second, "hello")
    wait_for(lambda: (job := world.service.live(first)) and job.tokens > 0)
    world.service.stop(second)
    assert world.answer(second).state == "stopped"
    assert world.service.live(first) is not None
    world.service.stop(first)
    assert world.answer(first).content


@pytest.mark.parametrize("trouble", ["error", "oom", "crash"])
def test_an_engine_in_trouble_costs_no_text_and_the_next_message_is_answered(
    world: World, trouble: str
) -> None:
    here = world.conversation()
    world.service.send(here, f"/echo {trouble} tokens=4")
    answer = world.answer(here)
    assert answer.state == "error"
    assert answer.content
    assert answer.error is not None
    world.service.send(here, "still there?")
    assert world.answer(here).content == "You said: still there?"


def test_regenerate_keeps_the_earlier_reply_as_a_version(world: World) -> None:
    here = world.conversation()
    world.service.send(here, "once more")
    first = world.answer(here)
    world.service.regenerate(here)
    second = world.answer(here)
    assert (second.version, second.versions) == (2, 2)
    assert second.parent_id == first.parent_id
    world.service.select_version(here, first.id)
    assert world.store.thread(here)[-1].id == first.id


def test_a_stopped_reply_goes_on_where_it_ended(world: World) -> None:
    here = world.conversation()
    world.service.send(here, "/echo tokens=1000 speed=50")
    wait_for(lambda: (job := world.service.live(here)) and job.tokens > 3)
    world.service.stop(here)
    before = world.answer(here)
    world.service.resume(before.id)
    after = world.answer(here)
    assert after.id == before.id
    assert after.content.startswith(before.content)
    assert len(after.content) > len(before.content)


def test_what_is_growing_is_on_disk_within_half_a_second(world: World) -> None:
    here = world.conversation()
    reply = world.service.send(here, "/echo tokens=1000 speed=100")
    wait_for(lambda: len(world.store.get_message(reply.id).content) > 0)
    job = world.service.live(here)
    assert job is not None
    wrote = len(job.content)
    wait_for(lambda: len(world.store.get_message(reply.id).content) >= wrote, seconds=0.5)
    assert world.store.get_message(reply.id).state == "streaming"
    world.service.stop(here)


def test_history_is_cut_by_whole_rounds_and_it_is_said(world: World) -> None:
    here = world.conversation(ChatSettings(history="rounds", history_rounds=1))
    for number in range(4):
        world.service.send(here, f"message {number}")
        world.answer(here)
    assert [m.left_out for m in world.store.thread(here) if m.role == "assistant"] == [0, 0, 1, 2]


@pytest.mark.parametrize("text", ["", "   \n\t"])
def test_an_empty_message_is_refused_and_nothing_is_written(world: World, text: str) -> None:
    here = world.conversation()
    with pytest.raises(InvalidInput, match="empty"):
        world.service.send(here, text)
    assert world.store.thread(here) == []


def test_a_huge_message_is_refused_with_the_limit(world: World) -> None:
    here = world.conversation()
    with pytest.raises(InvalidInput, match="200000"):
        world.service.send(here, "x" * 1_000_000)
    assert world.store.thread(here) == []


def test_a_message_longer_than_max_length_is_kept_and_told(world: World) -> None:
    here = world.conversation(ChatSettings(GenerationParams(max_length=64)))
    world.service.send(here, "word " * 500)
    answer = world.answer(here)
    assert answer.state == "error"
    assert answer.error is not None
    assert answer.error[1] == "prompt_too_long"
    assert world.store.thread(here)[0].content == "word " * 500


def test_without_a_model_the_reader_is_told_to_choose_one(tmp_path: Path) -> None:
    world = World(tmp_path, spec=None)
    with pytest.raises(ModelError, match="Choose one"):
        world.service.send(world.conversation(), "hello")
    world.service.close()


def test_one_reply_at_a_time_in_a_conversation(world: World) -> None:
    here = world.conversation()
    world.service.send(here, "/echo tokens=1000 speed=50")
    for ask in (lambda: world.service.send(here, "me too"), lambda: world.service.regenerate(here)):
        with pytest.raises(Busy, match="Stop"):
            ask()
    world.service.stop(here)


def test_closing_marks_what_was_cut_short_as_interrupted(tmp_path: Path) -> None:
    world = World(tmp_path)
    running, queued = world.conversation(), world.conversation()
    world.service.send(running, "/echo tokens=1000 speed=50")
    world.service.send(queued, "hello")
    wait_for(lambda: (job := world.service.live(running)) and job.tokens > 3)
    world.service.close()
    store = Store.open(tmp_path)
    assert store.thread(running)[-1].state == "interrupted"
    assert store.thread(running)[-1].content
    assert store.thread(queued)[-1].state == "interrupted"
    store.close()


def test_a_disk_that_refuses_is_shown_and_the_text_is_saved_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = world.conversation()

    def refuse(*_: Any, **__: Any) -> None:
        raise StoreError("disk_full")

    with monkeypatch.context() as full:
        full.setattr(world.store, "grow_reply", refuse)
        full.setattr(world.store, "finish_reply", refuse)
        reply = world.service.send(here, "precious")
        wait_for(lambda: (job := world.service.live(here)) and job.save_error and job.finish_reason)
        job = world.service.live(here)
        assert job is not None
        assert job.content == "You said: precious"
    wait_for(lambda: world.service.live(here) is None)
    assert world.store.get_message(reply.id).content == "You said: precious"


def test_deleting_a_conversation_stops_its_reply_and_can_be_undone(world: World) -> None:
    here = world.conversation()
    world.service.send(here, "/echo tokens=1000 speed=50")
    world.service.delete(here)
    wait_for(lambda: world.service.live(here) is None)
    assert here not in [c.id for c in world.store.conversations()]
    world.service.restore(here)
    assert here in [c.id for c in world.store.conversations()]


def test_every_change_is_told_to_those_who_look(world: World) -> None:
    seen = [world.service.changes]

    def moved() -> bool:
        seen.append(world.service.changes)
        return seen[-1] > seen[-2]

    here = world.conversation()
    assert moved()
    world.service.rename(here, "Title")
    assert moved()
    world.service.delete(here)
    assert moved()
    world.service.restore(here)
    assert moved()


def test_a_prompt_too_long_for_what_memory_turns_out_to_hold_is_cut(tmp_path: Path) -> None:
    engine = EngineClient(ECHO)
    service = ChatService(Store.open(tmp_path), engine, lambda: ECHO, lambda _: pieces.count)
    here = service.new_conversation(ChatSettings()).id
    for text in (*(f"message {number} " + "word " * 60 for number in range(4)), "/echo context=512"):
        service.send(here, text)
        wait_for(lambda: service.live(here) is None)
    answer = service.store.thread(here)[-1]
    assert (answer.content, answer.state) == ("context=512", "done")
    assert answer.left_out > 0
    assert answer.note == notes.note("memory_context", tokens=512)
    service.close()


def test_a_reply_that_ended_at_max_length_goes_on_from_its_end(world: World) -> None:
    here = world.conversation(ChatSettings(GenerationParams(max_length=128)))
    world.service.send(here, "/echo tokens=1000")
    before = world.answer(here)
    assert before.finish_reason == "length"
    world.service.resume(before.id)
    after = world.answer(here)
    assert after.error is None
    assert after.content.startswith(before.content + "You said: ")
    assert after.note == "begun_left_out"
    assert "only the end" in notes.words(after.note, "en")[0]
