"""The Models area and the welcome: what they tell, and what their buttons do. No browser, no hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glmui.errors import Busy, FetchError, InvalidInput, ModelError, NotFound
from glmui.hub import catalogue
from glmui.hub import get as hub
from glmui.i18n import Words
from glmui.meter import Card, Meter, Reading
from glmui.types import EngineInfo, Progress
from glmui.ui import model_words, present_models
from glmui.ui.desk import Desk
from glmui.ui.inventory import needs_of
from glmui.ui.shelf import Shelf, plain_name
from tests.small_world import World, wait_for

GB = 10**9
INT4 = "chatglm-6b-int4"


class Memory(Meter):
    """A computer with 16 GB, 10 of them free, and the cards given."""

    def __init__(self, *cards: Card, used: int = 6 * GB) -> None:
        self.reading = Reading(cards, used, 16 * GB, None, "")

    def read(self, engine_pid: int | None) -> Reading:
        return self.reading


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.service.close()


@pytest.fixture
def desk(world: World) -> Iterator[Desk]:
    desk = world.desk(model="", meter=Memory())
    yield desk
    desk.shelf.downloads.close()


@pytest.fixture
def shelf(desk: Desk) -> Shelf:
    return desk.shelf


def put(data_dir: Path, name: str) -> Path:
    """A folder that passes for a model as long as nobody loads it."""
    folder = data_dir / "models" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (folder / "model.safetensors").write_bytes(b"x" * 5000)
    return folder


def begin(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, *told: Progress, fail: Exception | None = None
) -> None:
    """A fetch that has told of its progress and waits to be cancelled, or fails."""

    def get(name: str, settings: Any, show: Callable[[Progress], None], control: Any) -> Path:
        for progress in told:
            show(progress)
        if fail:
            raise fail
        wait_for(lambda: control.cancelled)
        raise FetchError("fetch_cancelled")

    monkeypatch.setattr(hub, "get", get)
    shelf.act("get", INT4, {"accept": "yes"})
    assert shelf.downloads.task
    task = shelf.downloads.task
    wait_for(lambda: task.ended if fail else not told or task.progress == told[-1])


def card(html: str, name: str) -> str:
    """The part of the page that tells of one model."""
    found = re.search(rf'<li data-name="{name}".*?</li>', html, re.DOTALL)
    assert found, name
    return found[0]


def page(shelf: Shelf, language: str = "en") -> str:
    return present_models.models(shelf.look(), Words(language))


def first_start(shelf: Shelf, language: str = "en") -> str:
    return present_models.welcome(shelf.look(), Words(language))


def acts(html: str) -> set[str]:
    return set(re.findall(r'data-act="(\w+)"(?! disabled)', html))


# What is told


def test_a_first_start_recommends_chatglm_with_size_licence_and_needs(shelf: Shelf) -> None:
    told = card(first_start(shelf), INT4)
    assert "Recommended" in told
    assert "3.9 GB to download" in told
    assert catalogue.offer(INT4).licence.link in told
    assert "needs 6 GB, 10 GB free" in told
    assert 'class="warn"' not in told
    assert "Recommended" not in card(first_start(shelf), "starter")


def test_where_it_does_not_fit_the_starter_is_recommended_and_the_reason_told(world: World) -> None:
    shelf = world.desk("", Memory(used=12 * GB)).shelf
    assert "6 GB of memory, and 4 GB is free now" in card(first_start(shelf), INT4)
    assert "Recommended" in card(first_start(shelf), "starter")
    huge = card(page(shelf), "glm-4-9b-chat")
    assert "this computer has 16 GB in all" in huge


def test_a_card_that_holds_the_model_is_enough(world: World) -> None:
    big = Card(0, "RTX 3060", 1 * GB, 12 * GB, None)
    shelf = world.desk("", Memory(big, used=14 * GB)).shelf
    told = card(page(shelf), INT4)
    assert "RTX 3060" in told
    assert "needs 6 GB, 11 GB free" in told
    assert 'class="warn"' not in told


def test_what_the_engine_holds_counts_as_free() -> None:
    offer = catalogue.offer(INT4)
    card, on_card = Card(0, "", 7 * GB, 8 * GB, own=6 * GB), EngineInfo(device="cuda:0")
    reading = Reading((card,), 15 * GB, 16 * GB, 9 * GB, "", 5 * GB)  # pages of files are free already
    assert [need.free for need in needs_of(offer, reading, on_card)] == [7 * GB, 6 * GB]
    unknown = Reading((Card(0, "", None, None, None),), None, None, None, "unknown")
    assert needs_of(offer, unknown, on_card) == ()


def test_what_others_hold_of_a_card_is_not_the_engines() -> None:
    """On Windows, where no driver tells what a process holds: only the cards that it computes on count."""
    offer = catalogue.offer(INT4)
    cards = tuple(Card(n, "", 7 * GB, 8 * GB, own=None) for n in range(2))
    reading = Reading(cards, 15 * GB, 16 * GB, 9 * GB, "", 5 * GB)
    for device, free in {"cpu": [1, 1, 6], "cuda:0": [7, 1, 6], "cuda:1": [1, 7, 6]}.items():
        needs = needs_of(offer, reading, EngineInfo(device=device))
        assert [need.free // GB for need in needs] == free


def test_every_offer_stands_there_with_what_it_is(shelf: Shelf) -> None:
    for language in ("en", "zh"):
        html = page(shelf, language)
        for offer in catalogue.offers():
            assert offer.licence.name in card(html, offer.name)
        assert "shelf." not in html
        assert "models_about." not in html
        assert "shelf." not in first_start(shelf, language)


def test_models_here_are_told_with_size_and_state(shelf: Shelf, world: World) -> None:
    put(world.folder, INT4)
    put(world.folder, "mine")
    damaged = put(world.folder, "half-lost")
    (damaged / "model.safetensors").unlink()
    shelf.choice.change(model="mine")
    html = page(shelf)
    assert "In use" in card(html, "mine")
    assert acts(card(html, "mine")) == {"verify", "remove"}
    assert acts(card(html, INT4)) == {"use", "verify", "remove"}
    assert "Damaged" in card(html, "half-lost")
    assert "model.safetensors" in card(html, "half-lost")
    assert acts(card(html, "half-lost")) == {"remove"}
    assert str(world.folder / "models") in html
    assert html.count(f'data-name="{INT4}"') == 1, "what is here is not offered a second time"


def test_the_loaded_model_is_marked(shelf: Shelf, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    put(world.folder, "mine")
    monkeypatch.setattr(world.engine, "info", lambda: EngineInfo(state="ready", model="mine"))
    assert "In memory" in card(page(shelf), "mine")


def test_a_folder_that_vanishes_meanwhile_costs_one_look(
    shelf: Shelf, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(world.folder, "mine")
    assert shelf.names() == ["mine"]

    def vanished(*_: object) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr("glmui.hub.installed.everything", vanished)
    monkeypatch.setattr(hub, "half_fetched", vanished)
    monkeypatch.setattr("glmui.ui.shelf.LOOK_SECONDS", -1)
    assert "mine" in page(shelf)


def test_names_of_folders_are_no_html(shelf: Shelf, world: World) -> None:
    put(world.folder, "<img src=x onerror=alert(1)>")
    for html in (page(shelf), first_start(shelf)):
        assert "<img" not in html
        assert "&lt;img" in html


# Fetching


def test_a_licence_is_accepted_first(shelf: Shelf) -> None:
    with pytest.raises(InvalidInput, match="licence"):
        shelf.act("get", INT4, {})
    assert shelf.downloads.task is None
    assert "required" in card(page(shelf), INT4)


def test_progress_is_told_with_amount_speed_and_time_left(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(shelf, monkeypatch, Progress("fetching", 0.61, "x", 2_400_000_000, 3_900_000_000, 12_500_000.0))
    for html in (page(shelf), first_start(shelf)):
        told = card(html, INT4)
        assert "61%" in told
        assert "2.4 GB of 3.9 GB · 12 MB/s · about 2 min left" in told
        assert 'aria-valuenow="61"' in told
        assert acts(told) == {"pause", "cancel"}
    assert "get" not in acts(page(shelf)) - acts(card(page(shelf), INT4))
    running = shelf.downloads.running
    assert "Fetching the model… 61%" in present_models.aside(running, False, Words("en")), (
        "told beside the chat too"
    )
    shelf.act("pause", INT4, {})
    assert "Paused 61%" in card(page(shelf), INT4)
    assert acts(card(page(shelf), INT4)) == {"resume", "cancel"}
    shelf.act("resume", INT4, {})
    assert acts(card(page(shelf), INT4)) == {"pause", "cancel"}


def test_a_failure_is_told_in_its_place_and_can_be_tried_again(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(shelf, monkeypatch, fail=FetchError("pip_missing", python="python3"))
    told = card(page(shelf), INT4)
    assert "through pip" in told
    assert "Try again" in told
    assert acts(told) == {"get", "dismiss"}
    shelf.act("get", INT4, {})  # the licence was accepted already
    shelf.downloads.close()
    shelf.act("dismiss", INT4, {})
    assert "through pip" not in page(shelf)


def test_what_a_killed_app_had_fetched_can_be_gone_on_with_or_discarded(shelf: Shelf, world: World) -> None:
    half = world.folder / "downloads" / INT4
    half.mkdir(parents=True)
    with (half / "pytorch_model.bin").open("wb") as file:
        file.truncate(2_379_000_000)  # sparse
    told = card(first_start(shelf), INT4)
    assert "Paused at 61%" in told
    assert "Continue" in told
    assert acts(told) == {"get", "forget"}
    shelf.act("forget", INT4, {})
    assert not half.exists()
    assert "Paused" not in page(shelf)


def test_a_model_that_comes_is_chosen_where_none_is(
    shelf: Shelf, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "get", lambda name, *_: put(world.folder, name))
    shelf.act("get", "starter", {})
    wait_for(lambda: shelf.choice.settings.model == "starter")
    wait_for(lambda: not shelf.downloads.running)
    shelf.act("get", INT4, {"accept": "yes"})
    wait_for(lambda: not shelf.downloads.running)
    assert shelf.choice.settings.model == "starter", "another one is in use"
    assert set(shelf.names()) == {"starter", INT4}
    shelf.act("use", INT4, {})
    assert shelf.choice.settings.model == INT4


def test_from_the_welcome_it_is_chosen_anyway(
    shelf: Shelf, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(world.folder, "mine")
    shelf.choice.change(model="mine")
    monkeypatch.setattr(hub, "get", lambda name, *_: put(world.folder, name))
    shelf.act("get", INT4, {"accept": "yes"}, choose=True)
    wait_for(lambda: shelf.choice.settings.model == INT4)


# Checking, removing


def test_a_check_is_told_and_a_damaged_model_can_be_fetched_again(
    shelf: Shelf, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(world.folder, INT4)
    shelf.choice.change(model=INT4)
    problems: list[ModelError] = []
    monkeypatch.setattr(hub, "verify", lambda *_: problems)
    shelf.act("verify", INT4, {})
    wait_for(lambda: not shelf.downloads.running)
    assert "every file is as it should be" in card(page(shelf), INT4)
    problems.append(ModelError("verify_damaged", file="model.safetensors", model=INT4))
    shelf.act("verify", INT4, {})
    wait_for(lambda: not shelf.downloads.running)
    assert "model.safetensors" in card(page(shelf), INT4)
    assert "renew" in acts(card(page(shelf), INT4))
    monkeypatch.setattr(hub, "get", lambda name, *_: put(world.folder, name))
    shelf.act("renew", INT4, {})
    wait_for(lambda: not shelf.downloads.running)
    assert shelf.choice.settings.model == INT4, "it was in use, and is again"
    assert "model.safetensors" not in card(page(shelf), INT4)


def test_a_removed_model_can_be_brought_back_and_is_used_again(shelf: Shelf, world: World) -> None:
    put(world.folder, INT4)
    shelf.choice.change(model=INT4)
    shelf.act("remove", INT4, {})
    assert shelf.choice.settings.model == ""
    assert shelf.names() == []
    html = page(shelf)
    assert "is removed" in html
    assert "restore" in acts(html)
    shelf.act("restore", INT4, {})
    assert shelf.choice.settings.model == INT4
    assert "is removed" not in page(shelf)


def test_a_model_that_answers_is_not_removed_and_a_loaded_one_is_let_go(
    shelf: Shelf, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(world.folder, "mine")
    unloaded: list[bool] = []
    monkeypatch.setattr(world.engine, "info", lambda: EngineInfo(state="ready", model="mine"))
    monkeypatch.setattr(world.engine, "unload", lambda: unloaded.append(True))
    monkeypatch.setattr(world.service, "running", lambda: 1)
    with pytest.raises(Busy, match="reply"):
        shelf.act("remove", "mine", {})
    monkeypatch.setattr(world.service, "running", lambda: 0)
    shelf.act("remove", "mine", {})
    assert unloaded
    assert shelf.names() == []


def test_what_is_no_model_here_is_not_touched(shelf: Shelf, world: World, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    for name in ("../precious", str(tmp_path / "precious"), "", ".", "..", "nothing"):
        for act in ("remove", "use", "renew"):
            with pytest.raises(NotFound):
                shelf.act(act, name, {})
    assert (tmp_path / "precious").is_dir()
    with pytest.raises(InvalidInput):
        shelf.act("no such act", INT4, {})


# A folder of one's own


def test_an_import_asks_for_the_typed_name_where_nobody_knows_the_files(
    shelf: Shelf, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = tmp_path / "My model (2)"
    own.mkdir()
    asked: list[tuple[str, str, bool]] = []

    def import_folder(source: Path, name: str, *rest: Any) -> Path:
        asked.append((name, rest[-2], rest[-1]))
        if not rest[-1]:
            raise InvalidInput("import_untrusted", folder=source)
        return put(world.folder, name)

    monkeypatch.setattr(hub, "import_folder", import_folder)
    assert acts(page(shelf).partition('id="own-folder"')[2]) == {"import", "open"}
    shelf.act("import", "", {"folder": f'"{own}"', "name": "", "quantize": "int4"})
    wait_for(lambda: not shelf.downloads.running)
    below = page(shelf).partition('id="own-folder"')[2]
    assert "Type “My-model-2”" in below
    assert acts(below) == {"trust", "dismiss"}
    with pytest.raises(InvalidInput, match="My-model-2"):
        shelf.act("trust", "", {"typed": "my model"})
    assert len(asked) == 1
    shelf.act("trust", "", {"typed": " My-model-2 "})
    wait_for(lambda: not shelf.downloads.running)
    assert asked == [("My-model-2", "int4", False), ("My-model-2", "int4", True)]
    assert shelf.choice.settings.model == "My-model-2"


def test_a_wrong_folder_is_told_beside_the_form(shelf: Shelf, tmp_path: Path) -> None:
    shelf.act("import", "", {"folder": "https://example.com/model"})
    wait_for(lambda: not shelf.downloads.running)
    below = page(shelf).partition('id="own-folder"')[2]
    assert "no web address" in below
    assert "import" in acts(below), "the form stays for another try"
    with pytest.raises(InvalidInput):
        shelf.act("open", "", {"folder": "\\\\server\\models"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError):
        shelf.act("open", "", {"folder": str(tmp_path / "empty")})


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/a/b", "b"),
        ("C:\\models\\glm 4", "glm-4"),
        ("/x/模型", "model"),
        ("/.hidden", "hidden"),
        ("", "model"),
    ],
)
def test_a_name_is_made_of_the_folders(folder: str, name: str) -> None:
    assert plain_name(folder) == name


# Words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "less than a minute left"), (200, "about 3 min left"), (10_000, "about 2.8 h left")],
)
def test_time_is_told_as_people_do(seconds: float, words: str) -> None:
    assert model_words.time_left(seconds, Words("en")) == words


def test_small_and_large_amounts_of_room() -> None:
    assert [model_words.room(n) for n in (900_000_000, 1_500_000_000, 5_999_999_999)] == [
        "900 MB", "1.5 GB", "5 GB",
    ]  # fmt: skip


def test_the_look_is_plain_enough_to_be_compared(shelf: Shelf) -> None:
    """Two looks at an unchanged shelf are the same page: nothing is sent twice."""
    assert page(shelf) == page(shelf)
    json.dumps(first_start(shelf))
