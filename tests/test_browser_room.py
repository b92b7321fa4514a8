"""What the page says of room, and each offer for a message that memory has no room for.

The scripted engine pretends a card that holds all of ChatGLM-6B-INT4 and a conversation of some 1,000 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from tests.running_app import (
    MARKS,
    PATIENCE,
    App,
    chromium,
    opened,
    page_context,
    running_app,
    say,
    wait_for_text,
    wait_until_done,
)
from tests.small_world import echo_with_room

pytestmark = MARKS

SPEC = echo_with_room(1000)
ROUND = "/echo tokens=380"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    data = tmp_path_factory.mktemp("data")
    with running_app(data, GLMUI_MODEL=SPEC.model, GLMUI_DEVICE=SPEC.device) as app:
        yield app


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def context(browser: Browser, app: App) -> Iterator[BrowserContext]:
    yield from page_context(browser, app, {"width": 1440, "height": 900})


@pytest.fixture
def phone(browser: Browser, app: App) -> Iterator[BrowserContext]:
    yield from page_context(browser, app, {"width": 390, "height": 844})


def talked(page: Page, rounds: int) -> None:
    """So many rounds, of some 400 tokens each."""
    for number in range(1, rounds + 1):
        say(page, ROUND)
        expect(page.locator("#thread .user-row")).to_have_count(number, timeout=PATIENCE)
        wait_until_done(page)


def offers(page: Page) -> Locator:
    return page.locator("#offers [data-act]")


def offered(page: Page) -> list[str]:
    expect(page.locator("#offers .offers")).to_be_visible(timeout=PATIENCE)
    return offers(page).evaluate_all("(all) => all.map((one) => one.dataset.act)")


def tokens_left(page: Page) -> int:
    line = page.locator("#room .room")
    expect(line).to_contain_text("more tokens", timeout=PATIENCE)
    return int(re.sub(r"\D", "", line.inner_text().partition("·")[0]))


def test_the_room_left_counts_down_and_what_will_be_left_out_is_told(
    context: BrowserContext, app: App
) -> None:
    page = opened(context, app)
    expect(page.locator("#room .room")).to_have_count(0)
    talked(page, 1)
    first = tokens_left(page)
    assert 500 < first < 700
    say(page, ROUND)
    expect(page.locator("#room .room")).to_contain_text("leaves out the oldest round", timeout=PATIENCE)
    wait_until_done(page)
    expect(page.locator("#thread .from-here")).to_have_count(1)
    page.reload()
    expect(page.locator("#room .room")).to_contain_text("leaves out the oldest round", timeout=PATIENCE)
    expect(page.locator("#room .little")).to_have_count(0)


def test_leaving_out_the_oldest_rounds_is_the_first_offer_and_enter_takes_it(
    context: BrowserContext, app: App
) -> None:
    page = opened(context, app)
    talked(page, 2)
    say(page, "and now?")
    assert offered(page) == ["leave_out", "shorter", "move_layers", "on_cpu", "cancel"]
    expect(offers(page).first).to_be_focused()
    expect(page.locator("#box textarea")).to_have_value("and now?")
    expect(page.locator("#thread .user-row")).to_have_count(2)
    page.keyboard.press("Enter")
    wait_for_text(page, "You said: and now?")
    wait_for_text(page, "left out to make room")
    expect(page.locator("#offers .offers")).to_have_count(0)
    expect(page.locator("#box textarea")).to_have_value("")
    expect(page.locator("#thread .user-row")).to_have_count(3)


def test_escape_goes_back_to_writing_and_a_message_that_fits_then_goes(
    context: BrowserContext, app: App
) -> None:
    page = opened(context, app)
    box = page.locator("#box textarea")
    say(page, "word " * 600)
    assert offered(page) == ["move_layers", "on_cpu", "cancel"], "what would not help is not offered"
    page.keyboard.press("Escape")
    expect(page.locator("#offers .offers")).to_have_count(0, timeout=PATIENCE)
    expect(box).to_be_focused()
    expect(box).to_have_value("word " * 600)
    say(page, "word " * 600)
    offers(page).last.click()
    expect(page.locator("#offers .offers")).to_have_count(0, timeout=PATIENCE)
    expect(page.locator("#thread .user-row")).to_have_count(0)
    say(page, "hello")
    wait_for_text(page, "You said: hello")


def test_a_shorter_reply_is_as_short_as_was_said(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    talked(page, 2)
    say(page, "/echo tokens=900")
    offered(page)
    shorter = page.locator("#offers [data-act=shorter]")
    most = int(re.sub(r"\D", "", shorter.locator("small").inner_text()))
    shorter.click()
    wait_for_text(page, "ended where")
    wait_until_done(page)
    expect(page.locator("#thread .bot-row .message").last).not_to_contain_text("left out")
    expect(page.locator("#status")).to_contain_text(f"+ {most} tokens", timeout=PATIENCE)


def test_one_answer_on_the_cpu_and_the_next_on_the_card(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    talked(page, 2)
    say(page, "slowly")
    offered(page)
    page.locator("#offers [data-act=on_cpu]").click()
    wait_for_text(page, "You said: slowly")
    expect(page.locator("#engine .chip")).to_contain_text("cpu", timeout=PATIENCE)
    page.locator("#new").click()
    expect(page.locator("#thread .user-row")).to_have_count(0, timeout=PATIENCE)
    say(page, "fast")
    wait_for_text(page, "You said: fast")
    expect(page.locator("#engine .chip")).to_contain_text("cuda:0", timeout=PATIENCE)


def test_what_is_offered_fits_what_is_in_the_box_when_it_is_taken(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    talked(page, 2)
    say(page, "and now?")
    offered(page)
    page.locator("#box textarea").fill("word " * 600)
    page.locator("#offers [data-act=leave_out]").click()
    expect(page.locator("#offers [data-act=leave_out]")).to_have_count(0, timeout=PATIENCE)
    assert offered(page) == ["move_layers", "on_cpu", "cancel"]
    page.locator("#new").click()
    expect(page.locator("#offers .offers")).to_have_count(0, timeout=PATIENCE)


def test_a_phone_has_room_for_the_offers(phone: BrowserContext, app: App) -> None:
    page = opened(phone, app)
    talked(page, 2)
    say(page, "and now?")
    offered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for part in (page.locator("#offers .offers"), page.locator("#box")):
        box = part.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert box["y"] + box["height"] <= 844
    offers(page).last.scroll_into_view_if_needed()
    offers(page).last.click()
    expect(page.locator("#offers .offers")).to_have_count(0, timeout=PATIENCE)


def test_another_answer_asks_as_the_first_did(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    say(page, "word " * 600)
    offered(page)
    page.locator("#offers [data-act=on_cpu]").click()
    wait_for_text(page, "You said: word")
    wait_until_done(page)
    page.locator("#box textarea").fill("half a message")
    page.locator("#regenerate").click()
    assert offered(page) == ["move_layers", "on_cpu", "cancel"]
    expect(page.locator("#offers h2")).to_have_text("Not enough memory for this reply")
    page.keyboard.press("Escape")
    expect(page.locator("#offers .offers")).to_have_count(0, timeout=PATIENCE)
    expect(page.locator("#thread .versions, #versions .versions")).to_have_count(0)
    page.locator("#regenerate").click()
    offered(page)
    page.locator("#offers [data-act=on_cpu]").click()
    expect(page.locator("#versions .versions")).to_contain_text("2 / 2", timeout=PATIENCE)
    wait_until_done(page)
    wait_for_text(page, "You said: word")
    expect(page.locator("#box textarea")).to_have_value("half a message")


def test_a_reply_that_filled_the_room_goes_on(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    say(page, "/echo tokens=1500")
    wait_for_text(page, "ended where")
    wait_until_done(page)
    page.locator("#resume").click()
    offered(page)
    expect(offers(page).first).to_contain_text("Read only the end of the reply")
    offers(page).first.click()
    wait_for_text(page, "saw only the end of this reply")
    wait_until_done(page)


def test_a_refused_number_gives_way_to_the_kept_one(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    page.locator("#memory > button").click()
    idle, box = page.locator("#idle input"), page.locator("#box textarea")
    expect(idle).to_have_value("30", timeout=PATIENCE)
    idle.fill("-5")
    box.click()
    box.press_sequentially("typing goes on")
    expect(page.locator(".toast-wrap")).to_contain_text("idle_minutes", timeout=PATIENCE)
    expect(idle).to_have_value("30", timeout=PATIENCE)
    expect(box).to_have_value("typing goes on")


def test_layers_move_to_the_cpu_and_the_setting_stays(context: BrowserContext, app: App) -> None:
    """The last: it changes the settings of the others."""
    page = opened(context, app)
    talked(page, 2)
    expect(page.locator("#thread .from-here")).to_have_count(1, timeout=PATIENCE)
    say(page, "and now?")
    offered(page)
    move = page.locator("#offers [data-act=move_layers]")
    expect(move).to_contain_text(re.compile(r"Move (\d+ layers|one layer) to the CPU"))
    move.click()
    wait_for_text(page, "You said: and now?")
    wait_until_done(page)
    expect(page.locator("#thread .bot-row .message").last).not_to_contain_text("left out")
    expect(page.locator("#engine .chip")).to_contain_text("GPU and CPU", timeout=PATIENCE)
    expect(page.locator("#thread .from-here")).to_have_count(0, timeout=PATIENCE)
    kept = (app.data / "settings.toml").read_text(encoding="utf-8")
    assert 'device = "mixed"' in kept
    assert re.search(r"layers_on_gpu = \d+", kept)
    expect(page.locator("#device input")).to_have_value("GPU and CPU together")
