"""The memory's part of the settings as a reader meets it: a page for a 6 GB card, one for no card at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, TimeoutError, expect

from tests.card_world import CARD, GIB, OTHERS, CardWorld, served
from tests.running_app import MARKS, PATIENCE, chromium, say, wait_for_text, wait_until_done
from tests.small_world import wait_for

# The server runs in this process, where gradio's own old ways must not become errors.
pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

DESKTOP, PHONE = (1440, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_of_card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CardWorld, str]]:
    world = CardWorld(tmp_path_factory.mktemp("data"))
    with served(world.page, world.folder) as address:
        yield world, address
    world.service.close()


@pytest.fixture
def world(page_of_card: tuple[CardWorld, str]) -> CardWorld:
    """The card as it is at first, nothing loaded, all settings their defaults."""
    world, _ = page_of_card
    world.card.others = OTHERS
    world.engine.unload()
    world.choice.change(device="mixed", layers_on_gpu=None, kv_cache="auto", head_bits=16, context=2048)
    return world


@pytest.fixture
def page(browser: Browser, world: CardWorld, page_of_card: tuple[CardWorld, str]) -> Iterator[Page]:
    with _opened(browser, page_of_card[1]) as page:
        expect(layers(page)).to_be_visible()
        settled(page)
        yield page


@contextmanager
def _opened(
    browser: Browser, address: str, size: tuple[int, int] = DESKTOP, locale: str = "en-US"
) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, locale=locale)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(address)
    expect(page.locator("#plan .plan")).to_have_count(1, timeout=PATIENCE)
    yield page
    context.close()


def layers(page: Page) -> Locator:
    return page.locator("#layers input[type=range]")


def choose(page: Page, control: str, option: str) -> None:
    """Open the list, again where the settings' next look has closed it, and take one."""
    wait_for(lambda: _is_taken(page, control, option), seconds=30)


def _is_taken(page: Page, control: str, option: str) -> bool:
    page.locator(f"#{control} input").blur()
    page.locator(f"#{control} input").click()
    with suppress(TimeoutError):
        page.get_by_role("option", name=option, exact=True).click(timeout=2000)
        return True
    return False


def vram(page: Page) -> float:
    found = re.search(r"([\d.]+) of [\d.]+ GB VRAM", page.locator("#plan").inner_text())
    return float(found.group(1)) if found else 0.0


def settled(page: Page) -> None:
    """What is under way to the page has come. (News come with the regular tick and with one of their own.)"""
    page.wait_for_timeout(1000)


def colour(page: Page) -> str:
    """Of the words that tell what the slider comes to."""
    colour: str = page.locator("#plan p").first.evaluate("(p) => getComputedStyle(p).color")
    return colour


def test_the_prediction_follows_the_slider_and_is_kept_once_it_rests(page: Page, world: CardWorld) -> None:
    box = layers(page).bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.95, middle)
    page.mouse.down()
    seen = []
    for part in (0.7, 0.4):
        page.mouse.move(box["x"] + box["width"] * part, middle, steps=4)
        expect(page.locator("#plan")).to_contain_text(f"{layers(page).input_value()} of 28 layers")
        seen.append(vram(page))
    assert seen[0] > seen[1] > 2
    page.wait_for_timeout(2500)  # a tick of the page's comes by
    assert world.choice.settings.layers_on_gpu is None
    page.mouse.up()
    wait_for(lambda: world.choice.settings.layers_on_gpu == int(layers(page).input_value()))
    expect(page.locator("#layers-fit input")).not_to_be_checked()


def test_the_slider_is_kept_by_keys_too_and_goes_back_to_automatic(page: Page, world: CardWorld) -> None:
    fits = int(layers(page).input_value())
    layers(page).press("ArrowLeft")
    wait_for(lambda: world.choice.settings.layers_on_gpu == fits - 1)
    settled(page)
    page.locator("#layers-fit input").click()
    wait_for(lambda: world.choice.settings.layers_on_gpu is None)
    expect(page.locator("#layers-fit input")).to_be_checked(timeout=PATIENCE)
    expect(layers(page)).to_have_value(str(fits), timeout=PATIENCE)


def test_an_empty_box_of_the_slider_stops_nothing(page: Page, world: CardWorld) -> None:
    box = page.locator("#layers input[type=number]")
    box.fill("")
    expect(page.locator("#plan")).to_contain_text("Everything runs on the CPU")
    world.choice.change(device="cpu")  # whatever is news still comes to the page, with each tick
    expect(layers(page)).to_be_hidden(timeout=PATIENCE)


def test_what_does_not_fit_is_a_warning_with_what_to_do(page: Page, world: CardWorld) -> None:
    calm = colour(page)
    world.card.others = 3 * GIB
    layers(page).press("End")
    layers(page).press("ArrowLeft")
    warning = page.locator("#plan .short")
    expect(warning).to_contain_text("GB short")
    expect(warning).to_contain_text(re.compile(r"Keep it to \d+ layers"))
    assert colour(page) != calm


def test_what_goes_where_unfolds_and_stays_while_the_slider_moves(page: Page, world: CardWorld) -> None:
    expect(page.locator("#where table")).to_be_hidden()
    page.locator("#where button").click()
    expect(page.locator("#where table")).to_contain_text("layers 0 to 27")
    for _ in range(8):
        layers(page).press("ArrowLeft")
    left = int(layers(page).input_value())
    table = page.locator("#where table")
    expect(table).to_be_visible()
    expect(table.locator("tr", has_text=f"layers 0 to {left - 1}")).to_contain_text("GPU")
    expect(table.locator("tr", has_text=f"layers {left} to 27")).to_contain_text("CPU")


def test_what_memory_is_kept_for_is_folded_away_and_tells_at_once(page: Page, world: CardWorld) -> None:
    expect(page.locator("#kv-cache")).to_be_hidden()
    page.locator("#memory > button").click()
    before = vram(page)
    choose(page, "kv-cache", "INT8, half of FP16")
    wait_for(lambda: world.choice.settings.kv_cache == "int8")
    wait_for(lambda: vram(page) < before - 0.2)
    choose(page, "head-bits", "INT8")
    wait_for(lambda: world.choice.settings.head_bits == 8)
    wait_for(lambda: vram(page) < before - 0.6)
    page.locator("#context input").fill("512")
    page.locator("#context input").press("Tab")
    wait_for(lambda: world.choice.settings.context == 512)
    wait_for(lambda: vram(page) < before - 0.9)
    settled(page)
    wait_for(lambda: _is_refused(page, "#vram-reserve input", "-1", "vram_reserve_gb"), seconds=30)


def _is_refused(page: Page, box: str, value: str, named: str) -> bool:
    """Whether the page says so. The settings' next look may come between the typing and the leaving."""
    page.locator(box).fill(value)
    page.locator(box).press("Tab")
    page.wait_for_timeout(1000)
    return any(named in words for words in page.locator(".toast-body").all_inner_texts())


def test_the_card_is_set_free_with_the_numbers_before_and_after(page: Page, world: CardWorld) -> None:
    say(page, "wake up")
    wait_for_text(page, "You said: wake up")
    wait_until_done(page)
    kernels = re.compile("glmui's own kernels.*sm_86|sm_86.*glmui's own kernels", re.DOTALL)
    expect(page.locator("#engine .chip")).to_have_attribute("title", kernels, timeout=PATIENCE)
    expect(page.locator("#plan")).to_contain_text("20 of 28 layers", timeout=PATIENCE)
    expect(page.locator("#unload")).to_have_text("Free my card now")
    page.locator("#unload").click()
    freed = page.locator("#freed [role=status]")
    expect(freed).to_contain_text(f"{CARD}: 4.7 GB of VRAM in use before, 400 MB now.", timeout=PATIENCE)
    expect(freed).to_contain_text("The next message loads the model again.")
    expect(page.locator("#engine .chip")).to_contain_text("asleep", timeout=PATIENCE)


def test_a_phone_shows_slider_line_and_table_without_overflow(
    browser: Browser, world: CardWorld, page_of_card: tuple[CardWorld, str]
) -> None:
    with _opened(browser, page_of_card[1], PHONE, "zh-CN") as page:
        page.locator("#right .toggle-button").click()
        page.locator("#where button").click()
        for part in ("#layers", "#plan", "#where table", "#unload"):
            page.locator(part).scroll_into_view_if_needed()
            box = page.locator(part).bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= PHONE[0]
        expect(page.locator("#plan")).to_contain_text("层全部在显卡上")
        expect(page.locator("#unload")).to_have_text("立即释放显存")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]


def test_without_a_card_the_plan_is_the_rams(browser: Browser, tmp_path: Path) -> None:
    world = CardWorld(tmp_path, cards=False)
    with served(world.page, world.folder) as address, _opened(browser, address) as page:
        expect(page.locator("#plan")).to_contain_text("Everything runs on the CPU", timeout=PATIENCE)
        expect(page.locator("#plan")).to_contain_text("GB RAM")
        page.locator("#where button").click()
        expect(page.locator("#where table")).not_to_contain_text("GPU")
        expect(layers(page)).to_be_hidden()
        page.locator("#memory > button").click()
        expect(page.locator("#kv-cache")).to_be_visible()
        expect(page.locator("#vram-reserve")).to_have_count(0)
        expect(page.locator("#unload")).to_have_text("Free the memory now")
    world.service.close()
