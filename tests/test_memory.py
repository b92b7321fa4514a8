"""What the page says of memory, before and after: with an imagined 6 GB card, and with none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from glmui.errors import InvalidInput
from glmui.i18n import Words
from glmui.memory.forecast import Forecast
from glmui.memory.plan_request import CUDA_CONTEXT
from glmui.meter import Reading
from glmui.types import EngineSpec
from glmui.ui import desk as desk_module
from glmui.ui import memory as memory_module
from glmui.ui import present_plan
from glmui.ui.memory import Memory
from glmui.ui.memory_events import MemoryEvents
from tests.card_world import CARD, GIB, HELD, CardWorld

GB = 10**9


@pytest.fixture
def world(tmp_path: Path) -> Iterator[CardWorld]:
    world = CardWorld(tmp_path, device="mixed")
    yield world
    world.service.close()


@pytest.fixture
def memory(world: CardWorld) -> Memory:
    return world.page.memory


@pytest.fixture
def events(memory: Memory) -> MemoryEvents:
    return MemoryEvents(memory, Words("en"))


def words(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", markup)).strip()


def wake(world: CardWorld) -> None:
    """Have the model answer something, so that it is loaded."""
    here = world.conversation()
    world.service.send(here, "hello")
    world.answer(here)


def of_vram(line: str) -> tuple[float, float]:
    need, free = re.search(r"([\d.]+) of ([\d.]+) GB VRAM", line).groups()  # type: ignore[union-attr]
    return float(need), float(free)


def test_each_step_of_the_slider_tells_what_it_would_take(events: MemoryEvents) -> None:
    told = [words(events.predict(layers)[1]) for layers in range(1, 29)]
    needs = [of_vram(line)[0] for line in told]
    assert needs == sorted(needs)
    assert 2.5 < needs[-1] - needs[0] < 4.5
    assert told[19].startswith("20 of 28 layers on the card")
    assert told[27].startswith("All 28 layers on the card")
    assert all(re.search(r"room for about [\d,]+ tokens$", line) for line in told)
    assert words(events.predict(0)[1]).startswith("Everything runs on the CPU")


def test_moving_the_slider_keeps_nothing_and_letting_go_reloads_with_the_next_message(
    world: CardWorld, events: MemoryEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    wake(world)
    configured: list[EngineSpec] = []
    monkeypatch.setattr(world.engine, "configure", configured.append)
    fit, *_ = events.predict(7)
    assert fit is False
    assert world.choice.settings.layers_on_gpu is None
    world.page.choose(layers_on_gpu=7)
    assert world.engine.info().state == "ready"
    assert configured == []
    wake(world)
    assert [spec.layers_on_gpu for spec in configured] == [7]


def test_what_does_not_fit_is_said_with_what_to_do(world: CardWorld, events: MemoryEvents) -> None:
    world.card.others = 3 * GIB
    _, line, table = events.predict(28)
    assert 'class="plan short"' in line
    need, free = of_vram(words(line))
    missing = float(re.search(r"([\d.]+) GB short", line).group(1))  # type: ignore[union-attr]
    assert missing == pytest.approx(need - free, abs=0.11)
    most = int(re.search(r"Keep it to (\d+) layers", line).group(1))  # type: ignore[union-attr]
    assert "short" not in events.predict(most)[1]
    assert "short" in events.predict(most + 1)[1]
    assert "layers 0 to 27" in table


def test_a_card_taken_by_others_sends_to_the_cpu_or_to_sharing(
    world: CardWorld, events: MemoryEvents
) -> None:
    world.card.others = 3 * GIB
    world.choice.change(device="cuda:0")
    assert "Choose “GPU and CPU together”" in events.plan(True, None, "", "")[0]
    world.card.others = int(5.8 * GIB)
    assert "Not one layer fits" in events.plan(True, None, "", "")[0]


def test_a_card_that_is_not_there_is_named_in_the_place_of_the_plan(
    world: CardWorld, memory: Memory, events: MemoryEvents
) -> None:
    world.choice.change(device="cuda:3")
    with pytest.raises(InvalidInput):
        memory.prospect(None)
    line, table = events.plan(True, None, "before", "before")
    assert "cuda:3 is not there" in line
    assert table == ""


def test_without_a_card_it_is_the_ram_that_counts(tmp_path: Path) -> None:
    world = CardWorld(tmp_path, cards=False)
    line, table = MemoryEvents(world.page.memory, Words("zh")).plan(True, None, "", "")
    assert re.match(r"全部在 CPU 上运行 · 内存 [\d.]+ / [\d.]+ GB", words(line))
    assert set(re.findall(r"<td>(\w+)</td>", table)) == {"CPU"}
    world.service.close()


@pytest.mark.parametrize(
    ("free", "cure"), [(2.0, "Close other programs"), (4.8, "Plan for a conversation of 1,")]
)
def test_short_ram_is_told_beside_a_card_that_has_room(
    world: CardWorld, events: MemoryEvents, monkeypatch: pytest.MonkeyPatch, free: float, cure: str
) -> None:
    reading = replace(world.meter.read(None), ram_total=8 * GB, ram_used=int((8 - free) * GB))
    monkeypatch.setattr(world.meter, "read", lambda pid: reading)
    line, _ = events.plan(False, 4, "", "")
    assert "4 of 28 layers on the card" in line
    assert re.search(rf"of {free} GB RAM · .* short", line)
    assert cure in line


def test_the_table_adds_up_to_what_the_line_says(events: MemoryEvents) -> None:
    _, line, table = events.predict(20)
    rows = re.findall(r"<td>(\w+)</td><td>([\d,]+) MB</td>", table)
    on_card = sum(int(size.replace(",", "")) for device, size in rows if device == "GPU")
    assert of_vram(words(line))[0] == pytest.approx(on_card / 1000 + CUDA_CONTEXT / 1e9, abs=0.06)
    assert "layers 0 to 19" in table
    assert "layers 20 to 27" in table
    assert "KV cache" in table


def test_a_model_that_no_plan_knows_has_neither_line_nor_table(
    world: CardWorld, events: MemoryEvents
) -> None:
    world.choice.change(model="echo")
    assert events.plan(True, None, "before", "before") == ("", "")
    assert events.controls()[1]["visible"] is False


def test_what_is_loaded_is_told_as_it_is_whatever_others_take_now(world: CardWorld, memory: Memory) -> None:
    wake(world)
    world.card.others = 2 * GIB  # beside the model, by now
    prospect = memory.prospect(None)
    assert prospect is not None
    assert prospect.found.plan.layers == world.engine.loaded.layers
    assert not prospect.short
    assert "20 of 28 layers" in present_plan.line(prospect, Words("en"))
    assert words(present_plan.table(prospect, Words("en"))).startswith("In memory now: 20 of 28 layers")
    world.engine.loaded = replace(world.engine.loaded, context_room=600)  # there was room for no more
    less = memory.prospect(None)
    assert less is not None
    assert less.found.plan.vram < prospect.found.plan.vram, "a cache that is not there takes nothing"
    changed = memory.prospect(12)
    assert changed is not None
    assert words(present_plan.table(changed, Words("en"))).startswith(
        "With the next message: 12 of 28 layers"
    )


def test_only_news_is_sent_to_the_page(events: MemoryEvents) -> None:
    line, table = events.plan(False, 12, "", "")
    again = events.plan(False, 12, line, table)
    assert again[0] == again[1] == {"__type__": "update"}


def test_the_slider_shows_what_fits_until_somebody_moves_it(world: CardWorld, events: MemoryEvents) -> None:
    fit, slider, *_ = events.controls()
    assert (fit["value"], slider["maximum"]) == (True, 28)
    assert slider["value"] > 20
    world.choice.change(layers_on_gpu=9)
    fit, slider, *_ = events.controls()
    assert (fit["value"], slider["value"]) == (False, 9)
    world.choice.change(device="cpu")
    assert [control["visible"] for control in events.controls()[:3]] == [False, False, True]


def test_freeing_waits_for_the_driver_and_tells_both_numbers(world: CardWorld, events: MemoryEvents) -> None:
    wake(world)
    busy, told = list(events.free())
    assert "Freeing" in busy
    assert f"{CARD}: 4.7 GB of VRAM in use before, 400 MB now." in told
    assert "RAM: the model held" in told
    assert "The next message loads the model again." in told
    assert 'role="status"' in told
    assert world.engine.info().state == "asleep"
    assert "No model is loaded" in list(events.free())[1]


def test_a_driver_that_still_counts_it_is_not_waited_for_for_ever(
    world: CardWorld, events: MemoryEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "SETTLE_SECONDS", 0.2)
    wake(world)
    world.card.lets_go = False
    assert "The driver still counts it as used" in list(events.free())[1]


def test_cards_go_by_the_names_that_torch_has_for_them(
    world: CardWorld, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one card hidden torch's cuda:0 is NVML's second: on offer, and when it was set free."""
    monkeypatch.setattr(world.card, "nvmlDeviceGetCount", lambda: 2)
    assert [name for _, name in world.page.devices("en")] == ["auto", "cpu", "cuda:0", "cuda:1", "mixed"]
    monkeypatch.setattr(world.card, "nvmlDeviceGetName", lambda index: f"card {index}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    offered = world.page.devices("en")
    assert [name for _, name in offered] == ["auto", "cpu", "cuda:0", "mixed"]
    assert offered[2][0] == "card 1 (cuda:0)"
    world.card.tells_owners = False
    wake(world)
    freed = memory.free()
    assert freed
    assert [before.index for before, _ in freed.cards] == [1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert [name for _, name in world.page.devices("en")] == ["auto", "cpu", "mixed"]


def test_a_driver_that_does_not_tell_whose_memory_it_is(world: CardWorld, memory: Memory) -> None:
    """As on Windows: then the engine's own word decides which cards it was on."""
    world.card.tells_owners = False
    wake(world)
    freed = memory.free()
    assert freed is not None
    assert freed.told
    (pair,) = freed.cards
    assert (pair[0].used or 0) - (pair[1].used or 0) == HELD


def test_the_doctor_is_told_what_the_loaded_model_holds(
    world: CardWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Reading | None] = []
    monkeypatch.setattr(desk_module, "examine", lambda machine: [])
    monkeypatch.setattr(desk_module, "this_machine", lambda *_, engine=None, **others: asked.append(engine))
    world.page.examine()
    wake(world)
    world.page.examine()
    assert asked[0] is None
    assert asked[1]
    assert asked[1].cards[0].own == HELD


def test_a_tick_asks_no_more_often_than_it_must(world: CardWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading takes some milliseconds, and every page asks every two seconds."""
    desk, foreseen = world.page, list[EngineSpec]()
    foresee = world.service.foresee

    def watched(spec: EngineSpec) -> Forecast | None:
        foreseen.append(spec)
        return foresee(spec)

    monkeypatch.setattr(world.service, "foresee", watched)
    MemoryEvents(desk.memory, Words("en")).controls()
    assert len(foreseen) == 1
    reading = world.meter.read(None)
    monkeypatch.setattr(world.meter, "read", lambda pid: pytest.fail("it was read already"))
    assert desk.shelf.look(reading).memory is reading


def test_ram_for_pages_of_files_alone_leaves_the_room(
    world: CardWorld, events: MemoryEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works, slowly: line, table and outlook say so together."""
    world.choice.change(device="cpu")
    reading = replace(world.meter.read(None), ram_total=8 * GIB, ram_used=int(3.5 * GIB))
    monkeypatch.setattr(world.meter, "read", lambda pid: reading)
    line, _ = events.plan(False, None, "", "")
    assert 'class="plan short"' in line
    assert "room for about 2,0" in line
    assert "It works, but slowly" in line
    assert "Plan for a conversation of 7" in line
    here = world.conversation()
    left = world.service.room_left(here)
    assert left is not None
    assert left.tokens > 1900
    reading = replace(reading, ram_used=int(4 * GIB))
    line, _ = events.plan(False, None, "", "")
    assert "room for about 2,0" in line
    assert "read from the disk" in line
    reading = replace(reading, ram_used=int(6.6 * GIB))
    line, _ = events.plan(False, None, "", "")
    assert "room for" not in line
    assert "Close other programs. With a conversation of" in line
