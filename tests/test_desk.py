from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from glmui.chat import Again
from glmui.errors import GlmuiError, InvalidInput, ModelError, NotFound
from glmui.outlook import Outlook
from glmui.types import ChatSettings, Once
from glmui.ui.desk import Desk
from tests.small_world import World, echo_with_room


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.service.close()


@pytest.fixture
def desk(world: World) -> Desk:
    return world.desk()


def test_the_first_message_makes_the_conversation(desk: Desk, world: World) -> None:
    here = desk.send("", "hello", ChatSettings(system="Be kind."), "tab")
    assert world.service.settings_of(here).system == "Be kind."
    assert world.answer(here).content == "You said: hello"
    assert desk.send(here, "more", ChatSettings(), "tab") == here


def test_a_refused_first_message_leaves_no_empty_conversation(desk: Desk, world: World) -> None:
    with pytest.raises(GlmuiError):
        desk.send("", "  ", ChatSettings(), "tab")
    assert world.store.conversations() == []


def test_following_shows_the_growth_and_ends_with_what_is_saved(desk: Desk, world: World) -> None:
    here = desk.send("", "/echo tokens=40 speed=100", ChatSettings(), "tab")

    async def watch() -> list[int]:
        return [len(v.live.content) if v.live else -1 async for v in desk.follow("tab", here, 60)]

    lengths = asyncio.run(watch())
    growing = [n for n in lengths if n >= 0]
    assert lengths[-1] == -1
    assert growing == sorted(growing)
    assert len(growing) > 2
    assert desk.view(here).messages[-1].content.count("word") == 20


def test_a_tab_follows_one_conversation_at_a_time(desk: Desk, world: World) -> None:
    here = desk.send("", "/echo tokens=1000 speed=50", ChatSettings(), "tab")

    async def both() -> None:
        first = desk.follow("tab", here, 60)
        await anext(first)
        second = desk.follow("tab", here, 60)
        await anext(second)
        assert [view async for view in first] == []
        assert (await anext(second)).live is not None

    asyncio.run(both())
    world.service.stop(here)


def test_a_tab_that_shows_something_old_is_told_to_get_a_follower(desk: Desk, world: World) -> None:
    async def watch(tab: str, conversation: str) -> str:
        return [view.stamp async for view in desk.follow(tab, conversation, 60)][-1]

    assert not desk.needs_follower("tab", "", asyncio.run(watch("tab", "")))
    here = desk.send("", "hello", ChatSettings(), "tab")
    world.answer(here)
    assert desk.needs_follower("tab", here, "")
    shown = asyncio.run(watch("tab", here))
    assert not desk.needs_follower("tab", here, shown)
    assert desk.needs_follower("tab", here, f"{here}:0:live"), "a view that came too late"
    world.service.send(here, "news")
    world.answer(here)
    assert desk.needs_follower("tab", here, shown)


def test_only_the_newest_messages_are_shown(desk: Desk, world: World) -> None:
    here = world.conversation()
    for number in range(4):
        _, reply = world.store.begin_round(here, str(number), "echo")
        world.store.finish_reply(reply.id, "answer", "done", "stop")
    assert desk.view(here, limit=3).more
    assert len(desk.view(here, limit=3).messages) == 3
    assert not desk.view(here, limit=8).more


def test_versions_are_leafed_through_round_and_round(desk: Desk, world: World) -> None:
    here = desk.send("", "hello", ChatSettings(), "tab")
    world.answer(here)
    for _ in range(2):
        world.service.regenerate(here)
        world.answer(here)
    seen = []
    for _ in range(4):
        reply = desk.view(here).last_reply
        assert reply is not None
        seen.append(reply.version)
        desk.show_version(here, 1)
    assert seen == [3, 1, 2, 3]


def test_an_address_of_a_lost_conversation_opens_a_new_one(desk: Desk, world: World) -> None:
    here = world.conversation()
    assert desk.open_conversation(here) == here
    world.service.delete(here)
    assert desk.open_conversation(here) == ""
    assert desk.open_conversation("no such") == ""


def test_a_folder_that_is_no_model_is_refused_and_the_choice_stays(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        desk.choose(model=str(tmp_path / "empty"))
    with pytest.raises(NotFound):
        desk.choose(model=str(tmp_path / "nowhere"))
    for elsewhere in ("https://example.com/model", "\\\\server\\share"):
        with pytest.raises(InvalidInput, match="on this computer"):
            desk.choose(model=elsewhere)
    assert desk.choice.settings.model == "echo"


def test_idle_minutes_reach_the_engine_and_the_file(desk: Desk, world: World) -> None:
    desk.choose(idle_minutes=5)
    assert world.engine.idle_seconds == 300
    assert "idle_minutes = 5" in (world.folder / "settings.toml").read_text()


def test_what_is_offered_for_want_of_room_is_done_once_or_kept(desk: Desk) -> None:
    outlook = Outlook(900, 1156, 1000, fits=False, reply_room=100, layers_to_move=4, layers_left=24)
    assert desk.take_offer("leave_out", outlook) == Once()
    assert desk.take_offer("shorter", outlook) == Once(max_new_tokens=100)
    assert desk.take_offer("on_cpu", outlook) == Once(device="cpu")
    assert desk.choice.settings.device == "auto"
    assert desk.take_offer("move_layers", outlook) == Once()
    assert (desk.choice.settings.device, desk.choice.settings.layers_on_gpu) == ("mixed", 24)


def test_a_message_is_asked_about_only_where_something_helps(tmp_path: Path) -> None:
    world = World(tmp_path, echo_with_room(1000))
    desk = world.desk()
    assert desk.outlook("", "hello", ChatSettings(), "tab") is None
    found = desk.outlook("", "word " * 600, ChatSettings(), "tab")
    assert found is not None
    assert found.fits_on_cpu
    assert desk.outlook("", "word " * 2000, ChatSettings(), "tab") is None, "max_length tells of it itself"
    with pytest.raises(InvalidInput, match="empty"):
        desk.outlook("", " ", ChatSettings(), "tab")
    here = desk.send("", "/echo tokens=1000 speed=50", ChatSettings(), "tab")
    assert desk.outlook(here, "word " * 600, ChatSettings(), "tab") is None, "it is busy"
    world.service.close()


def test_another_answer_is_asked_about_as_a_message_is(tmp_path: Path) -> None:
    world = World(tmp_path, echo_with_room(1000))
    desk = world.desk()
    assert desk.outlook_again(world.conversation(), "regenerate") is None, "there is nothing to answer"
    here = desk.send("", "word " * 600, ChatSettings(), "tab", Once(device="cpu"))
    assert desk.outlook_again(here, "regenerate") is None, "it is busy"
    assert world.answer(here).state == "done"
    wishes: tuple[Again, ...] = ("regenerate", "resume")
    for wish in wishes:
        found = desk.outlook_again(here, wish)
        assert found is not None
        assert found.fits_on_cpu
        desk.again(here, wish, "tab", desk.take_offer("on_cpu", found))
        assert world.answer(here).state == "done"
        assert world.engine.info().device == "cpu"
    world.service.close()


def test_a_reply_that_only_its_end_can_go_on_from_needs_no_question(tmp_path: Path) -> None:
    world = World(tmp_path, replace(echo_with_room(1000), device="cpu", context_most=1000))
    desk = world.desk()
    here = desk.send("", "/echo tokens=1500", ChatSettings(), "tab")
    assert world.answer(here).finish_reason == "length"
    found = world.service.outlook_again(here, "resume")
    assert found is not None
    assert found.cuts_reply
    assert desk.outlook_again(here, "resume") is None
    world.service.close()
