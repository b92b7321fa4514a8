"""What the page's events come to, without a browser: settings that are kept, refused or changed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from glmui.i18n import Words
from glmui.types import ChatSettings
from glmui.ui import settings_area
from glmui.ui.events import ENGINE_SETTINGS, Events
from tests.card_world import CardWorld
from tests.small_world import World, echo_with_room


@pytest.fixture
def world(tmp_path: Path) -> Iterator[CardWorld]:
    world = CardWorld(tmp_path)
    yield world
    world.service.close()


@pytest.fixture
def events(world: CardWorld) -> Events:
    return Events(world.page, Words("en"))


def tick(events: Events, seen: str, fit: bool, layers: int | None) -> tuple[Any, ...]:
    """What a tick brings a page whose slider stands so; seen: what it knows of the list and the settings."""
    return events.tick("tab", "", "", seen, 0, "", "", fit, layers, "", "")  # type: ignore[no-any-return]


def line(ticked: tuple[Any, ...]) -> str:
    """That tells of the plan: the last but one of what a tick updates."""
    return str(ticked[-2])


@pytest.mark.parametrize(
    ("name", "value"), [("context", 5), ("vram_reserve_gb", -1), ("threads", 0), ("idle_minutes", -5)]
)
def test_a_number_that_is_refused_gives_way_to_the_one_that_is_kept(
    events: Events, name: str, value: float
) -> None:
    before = events.kept(name)()
    with pytest.raises(gr.Error):
        events.choose(name)(value)
    assert events.kept(name)() == before


def test_the_line_tells_of_the_layers_that_the_slider_is_set_to(events: Events) -> None:
    """Layers were moved elsewhere, as an offer does: the slider still stands where it was."""
    seen = tick(events, "", True, None)[5]
    events.desk.choose(device="mixed", layers_on_gpu=7)
    ticked = tick(events, seen, True, 20)
    assert ticked[5] != seen
    assert "7 of 28 layers" in line(ticked)
    assert "12 of 28 layers" in line(tick(events, ticked[5], False, 12)), "the reader is moving it now"


def test_a_device_that_the_page_did_not_know_of_is_among_its_choices(tmp_path: Path) -> None:
    world = World(tmp_path)
    desk = world.desk()
    events = Events(desk, Words("en"))
    known = [name for _, name in desk.devices("en")]
    news = tick(events, "", True, None)
    desk.choose(device="mixed", layers_on_gpu=4)
    news = tick(events, news[5], True, None)
    device = next(update for update in news[4 : 9 + ENGINE_SETTINGS] if _value(update) == "mixed")
    assert "mixed" in [name for _, name in device["choices"]]
    assert "mixed" in known or len(device["choices"]) == len(known) + 1
    world.service.close()


def _value(update: Any) -> Any:
    return update.get("value") if isinstance(update, dict) else None


def test_numbers_of_a_conversation_are_brought_within_their_bounds() -> None:
    def gathered(**changes: Any) -> ChatSettings:
        values = dict(zip(settings_area.NAMES, settings_area.spread(ChatSettings()), strict=True))
        return settings_area.gather([{**values, **changes}[name] for name in settings_area.NAMES])

    low = gathered(history_rounds=-5, history_tokens=-5, max_length=1)
    assert (low.history_rounds, low.history_tokens, low.params.max_length) == (0, 64, 256)
    high = gathered(history_rounds=1e9, history_tokens=1e9)
    assert (high.history_rounds, high.history_tokens) == (50, 8192)
    assert gathered(history_rounds=None, history_tokens=None) == ChatSettings(), "left out, the default"
    assert gathered(history_rounds=0).history_rounds == 0


def test_what_is_offered_for_another_answer_is_done_for_it(tmp_path: Path) -> None:
    world = World(tmp_path, echo_with_room(1000))
    events = Events(world.desk(), Words("en"))
    here = events.desk.send("", "word " * 600, ChatSettings(), "tab")
    assert world.answer(here).state == "error"
    panel = events.asking.regenerate(here, "tab")
    assert 'data-wish="regenerate"' in panel
    assert world.answer(here).versions == 1, "nothing was done yet"

    def take(act: str) -> tuple[Any, ...]:
        values = settings_area.spread(ChatSettings())
        event = SimpleNamespace(act=act, wish="regenerate")
        return events.asking.take_offer(event, here, "half a message", "tab", *values)  # type: ignore[no-any-return]

    assert take("cancel")[2] == ""
    assert "on_cpu" in take("shorter")[2], "it is not among what helps: they are offered again"
    *kept, offers = take("on_cpu")
    assert (kept, offers) == ([gr.skip(), gr.skip()], ""), "the box keeps what is being written"
    assert (world.answer(here).state, world.answer(here).version) == ("done", 2)
    world.service.close()
