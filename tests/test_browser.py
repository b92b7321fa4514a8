"""The page as a reader meets it: one server, Chromium, the starter model and the scripted engine.

`./launch.sh test` runs these where Chromium is found; with CI set, a missing browser is a failure.
"""

from __future__ import annotations

import itertools
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from tests.hub_server import StandInHub
from tests.running_app import (
    MARKS,
    PATIENCE,
    App,
    chromium,
    last_reply,
    opened,
    page_context,
    running_app,
    say,
    use_folder,
    use_model,
    wait_for_text,
    wait_until_done,
)

pytestmark = MARKS


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInHub]:
    """A model hub whose repository of ChatGLM-6B-INT4 is empty until a test fills it."""
    with StandInHub({"zai-org/chatglm-6b-int4": tmp_path_factory.mktemp("repository")}) as hub:
        yield hub


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, starter_data: Path, hub: StandInHub) -> Iterator[App]:
    """No model is chosen yet; the starter lies ready, so that fetching it takes no second download."""
    data = tmp_path_factory.mktemp("data")
    (data / "models").mkdir()
    (data / "models" / "starter").symlink_to(starter_data / "models" / "starter")
    with running_app(data, GLMUI_MODEL_SOURCES=hub.address) as app:
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


# "/echo tokens=240" says "word " a hundred and twenty times: the word and the blank are a token each.


def check_that_it_answers(page: Page, app: App) -> None:
    """A short question to a model that says whatever it says."""
    number = page.locator("#max-length input[type=number]")
    number.fill("256")
    number.press("Tab")
    say(page, "你好")
    expect(page.locator("#thread .bot-row .message").last).not_to_have_text("…", timeout=PATIENCE)
    wait_until_done(page)
    expect(page.locator("#status")).to_contain_text("tokens/s", timeout=PATIENCE)
    assert any(state == "done" for state, _ in app.saved("%"))


# The tests below share the server and run in this order: the first finds no model chosen.


def model_card(page: Page, area: str, name: str) -> Locator:
    """What the welcome ("ways") or the Models area ("shelf") tells of one model."""
    return page.locator(f"#{area} li[data-name='{name}']")


@pytest.mark.starter
def test_a_first_start_leads_to_the_starter_and_a_real_answer(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    expect(page.locator("#welcome")).to_be_visible(timeout=PATIENCE)
    model_card(page, "ways", "starter").get_by_role("button", name="Use").click()
    expect(page.locator("#engine .chip")).to_contain_text("starter", timeout=180_000)
    expect(page.locator("#welcome")).to_be_hidden(timeout=PATIENCE)
    page.locator("#temperature input[type=number]").fill("0")
    page.locator("#temperature input[type=number]").press("Tab")
    say(page, "What is the capital of France?")
    expect(page.locator("#thread .user-row").last).to_contain_text("capital of France", timeout=5_000)
    expect(page.locator("#thread .bot-row .message").last).to_contain_text("Paris", timeout=120_000)
    wait_until_done(page)
    expect(page.locator("#status")).to_contain_text("tokens/s")


def test_a_first_start_fetches_chatglm_imports_it_and_chats(
    context: BrowserContext, app: App, hub: StandInHub, published_chatglm: Callable[[str], Path]
) -> None:
    for file in published_chatglm("int4").iterdir():
        shutil.copyfile(file, hub.repos["zai-org/chatglm-6b-int4"] / file.name)
    hub.rate = 400_000
    page = opened(context, app)
    page.locator("#shelf li").first.wait_for(state="attached")
    if (chosen := page.locator("#shelf li.chosen, #shelf li.loaded")).count():  # the test before chose one
        page.locator("#places button", has_text="Models").click()
        chosen.get_by_role("button", name="Remove").click()
        page.get_by_role("button", name="Back to the chat").first.click()
    card = model_card(page, "ways", "chatglm-6b-int4")
    expect(card).to_contain_text("Recommended", timeout=PATIENCE)
    card.get_by_role("button", name="Get").click()
    licence = page.locator("#ways .gm-card:popover-open")
    licence.get_by_role("button", name="Download").click()
    expect(licence).to_be_visible()  # the licence is not accepted yet
    assert hub.requests == []
    licence.get_by_role("checkbox").check()
    licence.get_by_role("button", name="Download").click()
    expect(card.get_by_role("progressbar")).to_be_visible(timeout=PATIENCE)
    expect(card).to_contain_text("MB/s", timeout=PATIENCE)
    card.get_by_role("button", name="Pause").click()
    expect(card).to_contain_text("Paused", timeout=PATIENCE)
    page.reload()
    expect(card).to_contain_text("Paused", timeout=PATIENCE)
    hub.rate = 0
    card.get_by_role("button", name="Continue").click()
    expect(page.locator("#engine .chip")).to_contain_text("chatglm-6b-int4", timeout=120_000)
    expect(page.locator("#welcome")).to_be_hidden(timeout=PATIENCE)
    check_that_it_answers(page, app)


def test_the_models_area_checks_removes_and_brings_back(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    if not (app.data / "models" / "chatglm-6b-int4").is_dir():
        pytest.skip("needs the model that the test before fetches")
    page.locator("#places button", has_text="Models").click()
    card = model_card(page, "shelf", "chatglm-6b-int4")
    expect(card.locator(".tag")).to_have_text(re.compile("In use|In memory"), timeout=PATIENCE)
    card.get_by_role("button", name="Check files").click()
    expect(card).to_contain_text("every file is as it should be", timeout=PATIENCE)
    card.get_by_role("button", name="Remove").click()
    page.locator("#shelf .removed[data-name='chatglm-6b-int4'] button").click()
    expect(card.locator(".tag")).to_have_text("In use", timeout=PATIENCE)
    card.get_by_role("button", name="Remove").click()
    expect(card.get_by_role("button", name="Get")).to_be_visible(timeout=PATIENCE)
    page.locator("#shelf input[name=folder]").fill("https://example.com/model")
    page.get_by_role("button", name="Import").click()
    expect(page.locator("#shelf .own .trouble")).to_contain_text("on this computer", timeout=PATIENCE)
    page.go_back()
    expect(page.locator("#welcome")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#models")).to_be_hidden()


def test_a_reply_streams_and_stop_keeps_what_came(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    use_model(page, "echo")
    say(page, "/echo tokens=2000 speed=40")
    wait_for_text(page, "word word")
    lengths = []
    for _ in range(4):
        lengths.append(len(last_reply(page)))
        page.wait_for_timeout(400)
    assert lengths == sorted(set(lengths)), "the text grows while it is written"
    page.locator("#box .stop-button").click()
    wait_for_text(page, "stopped")
    wait_until_done(page)
    page.locator("#resume").click()
    wait_for_text(page, re.compile(r"You said|word$"))
    wait_until_done(page)


def test_markdown_code_and_formulas_are_shown_and_html_is_not_run(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    say(page, "/echo markdown")
    wait_for_text(page, "Euler")
    wait_until_done(page)
    reply = page.locator("#thread .bot-row .message").last
    expect(reply.locator("table td").first).to_be_visible()
    expect(reply.locator("pre code")).to_contain_text('print("hello")')
    expect(reply.locator(".katex")).to_have_count(4)
    say(page, "/echo script")
    wait_for_text(page, "the rest of the reply")
    wait_until_done(page)
    assert "<script>" in last_reply(page)
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize(
    "text",
    [
        "${window.hacked = 1} `${window.hacked = 1}`",
        "C:\\users\\xampp \\u \\x",
        "<img src=x onerror='window.hacked = 1'>",
        "{{window.hacked = 1}} {{#each value}}",
        "a ` b\n\n<img src=x onerror='window.hacked = 1'> ` c",
        "$\\text{<svg/onload=window.hacked=1>}$ [x](javascript:window.hacked=1)",
        "![x](https://example.com/x.png) ![y][r]\n\n[r]: https://example.com/y.png",
    ],
)
def test_nothing_that_is_typed_is_run_or_fetched(context: BrowserContext, app: App, text: str) -> None:
    page = opened(context, app)
    say(page, text)
    wait_for_text(page, "You said")
    wait_until_done(page)
    title = text.split("\n")[0][:20]
    expect(page.locator("ul.conversations li.current .title")).to_contain_text(title, timeout=PATIENCE)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#thread .message img").count() == 0


def test_a_formula_may_hold_what_html_begins_with_and_prices_are_none(
    context: BrowserContext, app: App
) -> None:
    page = opened(context, app)
    say(page, "$a<b$ and \\(c<d\\) for $5 or $10 <b>")
    wait_for_text(page, "You said")
    wait_until_done(page)
    reply = page.locator("#thread .bot-row .message").last
    expect(reply.locator(".katex")).to_have_count(2)
    expect(reply.locator(".katex .mrel").first).to_have_text("<")
    expect(reply).to_contain_text("for $5 or $10 <b>")


def test_enter_breaks_no_composition(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    box = page.locator("#box textarea")
    box.fill("ni hao")
    for kind, how in (("keydown", "keyCode: 229"), ("keypress", "isComposing: true")):
        event = f"new KeyboardEvent('{kind}', {{key: 'Enter', {how}, bubbles: true, cancelable: true}})"
        box.evaluate(f"(box) => box.dispatchEvent({event})")
    page.wait_for_timeout(500)
    expect(box).to_have_value("ni hao")
    expect(page.locator("#thread .user-row")).to_have_count(0)
    box.press("Shift+Enter")
    box.press_sequentially("second line")
    expect(box).to_have_value("ni hao\nsecond line")
    box.press("Enter")
    expect(page.locator("#thread .user-row")).to_have_count(1, timeout=PATIENCE)
    wait_until_done(page)


def test_an_empty_message_does_nothing_and_the_box_says_why(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    say(page, "   ")
    expect(page.locator("#box textarea")).to_have_attribute(
        "placeholder", re.compile("empty"), timeout=PATIENCE
    )
    expect(page.locator("#thread .user-row")).to_have_count(0)


def test_a_megabyte_is_refused_with_the_limit_and_stays_in_the_box(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    page.locator("#box textarea").evaluate("(box) => { box.value = 'x'.repeat(1_000_000); }")
    page.locator("#box textarea").dispatch_event("input")
    page.locator("#box .submit-button").click()
    expect(page.locator(".toast-body")).to_contain_text("at most 200000", timeout=PATIENCE)
    assert page.evaluate("document.querySelector('#box textarea').value.length") == 1_000_000


def scrolled(page: Page) -> tuple[float, float]:
    """(how far the thread is scrolled down, how far it could be)."""
    box = "const b = document.querySelector('#thread .bubble-wrap');"
    top, most = page.evaluate(f"() => {{ {box} return [b.scrollTop, b.scrollHeight - b.clientHeight]; }}")
    return top, most


def test_the_thread_stays_at_its_end_unless_the_reader_scrolls_up(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    say(page, "/echo tokens=3000 speed=400")
    page.wait_for_function("() => document.querySelector('#thread .bubble-wrap').scrollTop > 300")
    top, most = scrolled(page)
    assert most - top < 80, "the end is in sight while the reply grows"
    page.locator("#thread").hover()
    page.mouse.wheel(0, -400)
    page.wait_for_timeout(300)
    before, _ = scrolled(page)
    page.wait_for_timeout(1200)
    after, most = scrolled(page)
    assert abs(after - before) < 5, "the reader's place is kept"
    assert most - after > 200
    page.locator("#box .stop-button").click()
    wait_until_done(page)


def test_another_conversation_can_be_read_while_one_is_written(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    say(page, "a quiet one")
    wait_for_text(page, "You said: a quiet one")
    quiet = page.url.partition("c=")[2]
    page.locator("#new").click()
    expect(page.locator("#thread .user-row")).to_have_count(0, timeout=PATIENCE)
    say(page, "/echo tokens=1200 speed=60")
    wait_for_text(page, "word word")
    busy = page.url.partition("c=")[2]
    for _ in range(4):
        page.locator(f"li[data-id='{quiet}'] .title").click()
        page.wait_for_timeout(150)
        page.locator(f"li[data-id='{busy}'] .title").click()
        page.wait_for_timeout(100)
    page.locator(f"li[data-id='{quiet}'] .title").click()
    expect(page.locator("#thread .user-row").first).to_contain_text("a quiet one", timeout=8_000)
    page.wait_for_timeout(1500)  # a late view of the other one is put right by the page's next tick
    expect(page.locator("#thread")).to_contain_text("a quiet one", timeout=8_000)
    page.locator(f"li[data-id='{busy}'] .title").click()
    wait_for_text(page, "word word")
    page.locator("#box .stop-button").click()
    wait_until_done(page)


def test_reload_in_mid_reply_loses_nothing(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    say(page, "/echo tokens=240 speed=40")
    wait_for_text(page, "word word")
    page.reload()
    wait_for_text(page, "word word")
    before = len(last_reply(page))
    page.wait_for_timeout(1000)
    assert len(last_reply(page)) > before
    wait_until_done(page)
    assert last_reply(page).count("word") == 120


def test_two_tabs_follow_one_reply_and_a_third_conversation_waits_its_turn(
    context: BrowserContext, app: App
) -> None:
    first = opened(context, app)
    say(first, "/echo tokens=300 speed=40")
    wait_for_text(first, "word word")
    second = opened(context, app, first.url.removeprefix(app.address))
    wait_for_text(second, "word word")
    other = opened(context, app)
    say(other, "hello from another tab")
    expect(other.locator("#status")).to_contain_text("Waiting", timeout=PATIENCE)
    for page in (first, second):
        wait_until_done(page)
        assert last_reply(page).count("word") == 150
    wait_for_text(other, "hello from another tab")
    assert "another tab" not in first.locator("#thread").inner_text()


def test_a_message_sent_in_one_tab_appears_in_the_other(context: BrowserContext, app: App) -> None:
    first = opened(context, app)
    say(first, "to be seen twice")
    wait_for_text(first, "to be seen twice")
    wait_until_done(first)
    second = opened(context, app, first.url.removeprefix(app.address))
    wait_for_text(second, "to be seen twice")
    say(first, "news for both")
    wait_for_text(second, "news for both")


def test_a_closed_tab_does_not_end_its_reply(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    say(page, "/echo tokens=120 speed=40")
    wait_for_text(page, "word word")
    address = page.url.removeprefix(app.address)
    page.close()
    time.sleep(4)
    again = opened(context, app, address)
    wait_until_done(again)
    assert last_reply(again).count("word") == 60


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_a_killed_engine_costs_the_reply_only(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    say(page, "/echo tokens=2000 speed=40")
    wait_for_text(page, "word word word")
    app.engine().kill()
    expect(page.locator("#thread .bot-row .message").last).to_contain_text(
        re.compile("engine|memory"), timeout=5_000
    )
    wait_until_done(page)
    assert last_reply(page).count("word") >= 3
    assert any(state == "error" and "word word" in text for state, text in app.saved("word word%"))
    say(page, "are you back?")
    wait_for_text(page, "You said: are you back?")


def test_conversations_are_listed_renamed_searched_deleted_and_brought_back(
    context: BrowserContext, app: App
) -> None:
    page = opened(context, app)
    say(page, "关于量子计算的问题")
    wait_until_done(page)
    row = page.locator("ul.conversations li.current")
    expect(row).to_contain_text("关于量子计算的问题", timeout=PATIENCE)
    row.hover()
    row.locator(".rename").click()
    row.locator("input").fill("not this")
    row.locator("input").press("Escape")
    expect(row).to_contain_text("关于量子计算的问题")
    row.hover()
    row.locator(".rename").click()
    row.locator("input").fill("Quantum 笔记")
    row.locator("input").press("Enter")
    expect(page.locator("ul.conversations li.current")).to_contain_text("Quantum 笔记", timeout=PATIENCE)
    page.locator("#search textarea, #search input").fill("量子")
    expect(page.locator("ul.conversations li")).to_have_count(1, timeout=PATIENCE)
    row = page.locator("ul.conversations li").first
    row.hover()
    row.locator(".delete").click()
    expect(page.locator("ul.conversations li .title")).to_have_count(0, timeout=PATIENCE)
    expect(page.locator("#thread .user-row")).to_have_count(0, timeout=PATIENCE)
    page.locator("#undo").click()
    expect(page.locator("ul.conversations li .title")).to_contain_text("Quantum 笔记", timeout=PATIENCE)
    wait_for_text(page, "量子计算")


def test_settings_belong_to_the_conversation(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    say(page, "mine")
    wait_until_done(page)
    number = page.locator("#top-k input[type=number]")
    number.fill("7")
    number.press("Tab")
    page.wait_for_timeout(500)
    page.locator("#new").click()
    expect(page.locator("#thread .user-row")).to_have_count(0, timeout=PATIENCE)
    page.locator("#reset").click()
    expect(number).to_have_value("50", timeout=PATIENCE)
    page.locator("ul.conversations .title", has_text="mine").first.click()
    expect(number).to_have_value("7", timeout=PATIENCE)


def test_regenerate_keeps_versions_to_leaf_through(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    say(page, "again please")
    wait_until_done(page)
    page.locator("#regenerate").click()
    expect(page.locator("#versions")).to_contain_text("2 / 2", timeout=PATIENCE)
    page.locator("#versions button").first.click()
    expect(page.locator("#versions")).to_contain_text("1 / 2", timeout=PATIENCE)


def test_a_wrong_folder_is_named(context: BrowserContext, app: App, tmp_path: Path) -> None:
    page = opened(context, app)
    use_folder(page, str(tmp_path))
    expect(page.locator(".toast-body")).to_contain_text("config.json", timeout=PATIENCE)
    expect(page.locator("#engine .chip")).to_contain_text("echo")


def test_memory_is_given_back_on_request(context: BrowserContext, app: App) -> None:
    page = opened(context, app)
    say(page, "wake up")
    wait_for_text(page, "wake up")
    wait_until_done(page)
    engine = app.engine()
    page.locator("#unload").click()
    expect(page.locator("#freed")).to_contain_text("now 0 MB", timeout=PATIENCE)
    assert not engine.is_running()


def test_the_page_speaks_chinese_and_switches(browser: Browser, app: App) -> None:
    context = browser.new_context(locale="zh-CN")
    page = opened(context, app)
    expect(page.locator("#new")).to_have_text(re.compile("新对话"))
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.locator("#looks button").first.click()
    expect(page.locator("#new")).to_have_text(re.compile("New chat"), timeout=PATIENCE)
    page.reload()
    expect(page.locator("#new")).to_have_text(re.compile("New chat"), timeout=PATIENCE)
    context.close()


def test_the_doctor_looks_while_the_page_goes_on_and_its_report_is_copied(
    context: BrowserContext, app: App
) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=app.address)
    page = opened(context, app)
    use_model(page, "echo")
    page.locator("#places button", has_text="Doctor").click()
    page.locator("#doctor-look").click()
    expect(page.locator("#findings .busy")).to_be_visible(timeout=PATIENCE)
    page.locator("#doctor button", has_text="Back to the chat").click()
    say(page, "are you still there?")
    wait_for_text(page, "You said: are you still there?")
    page.go_back()
    expect(page.locator("#findings dl")).to_contain_text("PyTorch", timeout=60_000)
    expect(page.locator("#findings .summary")).to_be_visible()
    page.locator("#doctor-copy").click()
    expect(page.locator("#doctor-copy")).to_have_text("Copied", timeout=PATIENCE)
    report = page.evaluate("navigator.clipboard.readText()")
    assert report.startswith("glmui ")
    assert "Python" in report
    assert str(Path.home()) not in report


def test_a_phone_shows_the_chat_without_overlap(phone: BrowserContext, app: App) -> None:
    page = opened(phone, app)
    say(page, "/echo markdown")
    wait_for_text(page, "Euler")
    wait_until_done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [page.locator(s).bounding_box() for s in ("#engine", "#thread", "#below", "#box")]
    assert all(boxes)
    for upper, lower in itertools.pairwise(boxes):
        assert upper is not None
        assert lower is not None
        assert upper["y"] + upper["height"] <= lower["y"] + 1
    last = boxes[-1]
    assert last is not None
    assert last["y"] + last["height"] <= 844
    page.locator("#left .toggle-button").click()
    expect(page.locator("#new")).to_be_in_viewport(timeout=PATIENCE)


def test_a_chatglm_folder_answers_in_the_page(
    context: BrowserContext, app: App, tiny_chatglm: Callable[[str], Path]
) -> None:
    page = opened(context, app)
    use_model(page, str(tiny_chatglm("int4")))
    check_that_it_answers(page, app)
    use_model(page, "echo")


def test_no_request_left_the_machine(app: App) -> None:
    assert app.asked
    hosts = {
        re.sub(r"^(\w+:)//([^/]*).*$", r"\2", url) for url in app.asked if url.startswith(("http", "ws"))
    }
    assert hosts == {f"127.0.0.1:{app.port}"}
