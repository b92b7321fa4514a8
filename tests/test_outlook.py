"""Whether memory has room for a message, what would help where it has not, and that it then does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from glmui.chat import Again
from glmui.errors import InvalidInput
from glmui.memory.forecast import Forecast, foreseen
from glmui.memory.plan_request import GIB
from glmui.outlook import Outlook
from glmui.types import ChatSettings, EngineSpec, GenerationParams, Message, Once
from tests.small_world import World, echo_with_room, foresee

ROOM = 1000
LONG = ChatSettings(GenerationParams(max_length=2048))


@pytest.fixture(scope="module")
def small() -> EngineSpec:
    """A card with all of the model on it, and room for ROOM tokens or a few more."""
    return echo_with_room(ROOM)


@pytest.fixture
def world(tmp_path: Path, small: EngineSpec) -> Iterator[World]:
    world = World(tmp_path, small)
    yield world
    world.service.close()


def words(tokens: int) -> str:
    """A text of so many of the scripted engine's tokens: words, and the blanks between them."""
    return " ".join(["word"] * (tokens // 2))


def said(world: World, rounds: int, tokens: int = 100, settings: ChatSettings = LONG) -> str:
    """A conversation of so many rounds; each takes about so many tokens."""
    here = world.conversation(settings)
    for _ in range(rounds):
        _, reply = world.store.begin_round(here, words(tokens // 2), "echo")
        world.store.finish_reply(reply.id, words(tokens // 2), "done", "stop")
    return here


def outlook(world: World, here: str, text: str, settings: ChatSettings = LONG) -> Outlook:
    found = world.service.outlook(here, text, settings)
    assert found is not None
    return found


def test_nothing_is_asked_where_memory_has_room_for_all_that_max_length_allows(world: World) -> None:
    short = ChatSettings(GenerationParams(max_length=512))
    assert world.service.outlook(said(world, 3), "hello", short) is None
    world.spec = EngineSpec("echo", "echo")
    assert world.service.outlook(said(world, 40), words(2000), LONG) is None, "nothing is known of memory"


def test_a_message_that_fits(world: World) -> None:
    found = outlook(world, said(world, 3), "hello")
    assert found.fits
    assert found.needed == found.prompt_tokens + 256


def test_the_oldest_rounds_are_offered_and_leaving_them_out_helps(world: World) -> None:
    here = said(world, 12)
    found = outlook(world, here, "hello")
    assert not found.fits
    assert found.needed > found.room
    assert 0 < found.rounds_to_leave_out < 12
    world.service.send(here, "hello")
    reply = world.answer(here)
    assert reply.left_out == found.rounds_to_leave_out
    assert reply.usage is not None
    assert reply.usage.prompt_tokens + 256 <= found.room


def test_the_offer_counts_the_rounds_as_the_line_and_the_note_do(world: World) -> None:
    """max_length alone leaves out some of so many; that is no reason to tell of fewer."""
    here = said(world, 30)
    found = outlook(world, here, "hello")
    left = world.service.room_left(here)
    assert left is not None
    world.service.send(here, "hello")
    assert world.answer(here).left_out == found.rounds_to_leave_out == left.for_room


def test_a_shorter_reply_is_offered_and_leaves_nothing_out(world: World) -> None:
    here = said(world, 8)
    found = outlook(world, here, "hello")
    assert found.reply_room == found.room - found.prompt_tokens
    world.service.send(here, "/echo tokens=900", once=Once(max_new_tokens=found.reply_room - 20))
    reply = world.answer(here)
    assert (reply.left_out, reply.finish_reason) == (0, "length")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == found.reply_room - 20


def test_as_few_layers_as_help_are_offered_to_be_moved(world: World, small: EngineSpec) -> None:
    found = outlook(world, said(world, 18), words(60))
    assert found.layers_to_move

    def room(left: int) -> int:
        forecast = foresee(replace(small, device="mixed", layers_on_gpu=left))
        return forecast.room if forecast else 0

    assert room(found.layers_left) >= found.needed
    assert room(found.layers_left + 1) < found.needed
    assert found.layers_left + found.layers_to_move == 28


def test_moving_layers_is_asked_of_a_few_forecasts(
    world: World, small: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[EngineSpec] = []

    def watched(spec: EngineSpec) -> Forecast | None:
        asked.append(spec)
        return foresee(spec)

    monkeypatch.setattr(world.service._rooms, "_foresee", watched)
    assert outlook(world, said(world, 18), words(60)).layers_to_move
    assert len(asked) < 6, "each reads the memory"


def test_layers_that_the_ram_has_no_room_for_are_not_offered_to_be_moved(
    world: World, small: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = said(world, 18)

    def crowded(spec: EngineSpec) -> Forecast | None:
        found = foresee(spec)
        return found and foreseen(spec, found.size, replace(found.machine, ram=GIB))

    monkeypatch.setattr(world.service._rooms, "_foresee", crowded)
    assert not outlook(world, here, words(60)).layers_to_move


def test_a_message_too_long_for_the_card_is_answered_on_the_cpu(world: World) -> None:
    here, text = said(world, 0), words(ROOM + 300)
    found = outlook(world, here, text)
    assert (found.rounds_to_leave_out, found.reply_room) == (0, 0)
    assert found.fits_on_cpu
    world.service.send(here, text, once=Once(device="cpu"))
    reply = world.answer(here)
    assert reply.state == "done"
    assert world.engine.info().device == "cpu"
    world.service.send(here, "and now?")
    world.answer(here)
    assert world.engine.info().device == "cuda:0"


def test_a_message_too_long_for_memory_is_refused_with_the_numbers(world: World) -> None:
    here = said(world, 2)
    world.service.send(here, words(ROOM + 300))
    reply = world.answer(here)
    assert reply.error is not None
    assert reply.error[1] == "prompt_beyond_memory"
    world.service.send(here, "shorter")
    assert world.answer(here).left_out >= 1


def test_only_what_helps_is_offered(world: World) -> None:
    huge = ChatSettings(GenerationParams(max_length=32768))
    found = outlook(world, said(world, 0), words(20_000), huge)
    assert not found.fits
    assert not found.can_be_helped


def test_beyond_max_length_is_another_matter(world: World) -> None:
    with pytest.raises(InvalidInput, match="max_length"):
        world.service.outlook(said(world, 0), words(2200), LONG)


def test_the_loaded_engine_knows_better_than_the_forecast(world: World, small: EngineSpec) -> None:
    here = said(world, 1)
    foreseen = foresee(small)
    assert foreseen is not None
    assert outlook(world, here, "hello").room <= foreseen.room, "a forecast promises no token too many"
    world.service.send(here, "hello")
    world.answer(here)
    known = world.engine.info().context_room
    assert known >= ROOM
    assert outlook(world, here, "hello").room == known
    world.spec = replace(small, device="mixed", layers_on_gpu=27)
    assert outlook(world, here, words(ROOM)).room > known, "the engine holds what was chosen before"


def test_room_left_counts_down_and_tells_what_the_next_message_leaves_out(world: World) -> None:
    here = world.conversation(ChatSettings(GenerationParams(max_length=512)))
    lefts = []
    for _ in range(12):
        _, reply = world.store.begin_round(here, words(30), "echo")
        world.store.finish_reply(reply.id, words(30), "done", "stop")
        world.service.rename(here, "title")  # what is saved has changed
        left = world.service.room_left(here)
        assert left is not None
        lefts.append(left)
    whole = [left for left in lefts if not left.left_out]
    assert [left.tokens for left in whole] == sorted((left.tokens for left in whole), reverse=True)
    assert lefts[-1].for_room == lefts[-1].left_out > 0
    assert not any(left.little for left in lefts), "leaving out old rounds is all in the day's work"
    world.service.send(here, "hi")
    assert world.answer(here).left_out == lefts[-1].left_out


def test_rounds_that_the_reader_leaves_out_are_no_want_of_room(world: World) -> None:
    here = said(world, 5, settings=ChatSettings(history="rounds", history_rounds=2))
    left = world.service.room_left(here)
    assert left is not None
    assert (left.left_out, left.for_room, left.little) == (3, 0, False)


def test_asking_often_costs_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    here = said(world, 5)
    world.service.room_left(here)

    def refuse(messages: list[Message]) -> int:
        raise AssertionError("counted again")

    monkeypatch.setattr(world.service, "_count", lambda spec: refuse)
    assert world.service.room_left(here) is not None
    world.service.rename(here, "changed")
    with pytest.raises(AssertionError, match="counted again"):
        world.service.room_left(here)


def test_it_is_little_room_only_where_a_message_itself_is_cramped(world: World) -> None:
    wordy = ChatSettings(GenerationParams(max_length=512), system=words(400))
    for settings, little in ((ChatSettings(GenerationParams(max_length=512)), False), (wordy, True)):
        left = world.service.room_left(said(world, 12, settings=settings))
        assert left is not None
        assert (left.left_out > 0, left.little) == (True, little)


def again(world: World, here: str, wish: Again) -> Outlook:
    found = world.service.outlook_again(here, wish)
    assert found is not None
    return found


def test_a_reply_is_made_anew_as_the_first_was(world: World) -> None:
    """It was possible on the CPU alone, and is so again."""
    here, text = said(world, 0), words(ROOM + 300)
    world.service.send(here, text, once=Once(device="cpu"))
    assert world.answer(here).state == "done"
    found = again(world, here, "regenerate")
    assert (found.needed, found.fits) == (outlook(world, world.conversation(LONG), text).needed, False)
    assert found.fits_on_cpu
    world.service.regenerate(here, once=Once(device="cpu"))
    assert (world.answer(here).state, world.answer(here).version) == ("done", 2)


def test_a_reply_made_anew_leaves_out_the_rounds_that_were_offered_or_is_shorter(world: World) -> None:
    here = said(world, 8)
    world.service.send(here, "/echo tokens=900")
    world.answer(here)
    found = again(world, here, "regenerate")
    assert found.rounds_to_leave_out > 0
    world.service.regenerate(here)
    assert world.answer(here).left_out == found.rounds_to_leave_out
    world.service.regenerate(here, once=Once(max_new_tokens=found.reply_room))
    reply = world.answer(here)
    assert reply.usage is not None
    assert (reply.left_out, reply.usage.completion_tokens) == (0, found.reply_room)


def test_a_reply_that_filled_the_room_goes_on_and_tells_what_it_went_on_from(world: World) -> None:
    here = world.conversation(LONG)
    world.service.send(here, "/echo tokens=1500")
    first = world.answer(here)
    assert first.finish_reason == "length"
    found = again(world, here, "resume")
    assert (found.fits, found.cuts_reply, found.rounds_to_leave_out) == (False, True, 0)
    for _ in range(2):
        before = world.answer(here).content
        world.service.resume(first.id)
        after = world.answer(here)
        assert after.state == "done"
        assert after.content.startswith(before)
        assert len(after.content) > len(before)
        assert "begun_left_out" in after.note.splitlines()


def test_a_reply_that_may_go_on_leaves_out_old_rounds_first(world: World) -> None:
    here = said(world, 6)
    world.service.send(here, "/echo tokens=450")
    world.answer(here)
    world.service.resume(world.answer(here).id)
    found = again(world, here, "resume")
    assert found.rounds_to_leave_out > 0
    assert not found.cuts_reply
