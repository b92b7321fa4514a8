"""The app as a test of the page meets it: a server of its own, and what a reader does in Chromium."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30_000  # ms: the machine may be busy with other tests
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]

MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not CHROMIUM and not os.environ.get("CI"), reason="no Chromium here (Debian: chromium)"
    ),
]


@dataclass
class App:
    """A running `python app.py`, and every address its pages asked for."""

    process: subprocess.Popen[str]
    port: int
    data: Path
    asked: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def engine(self) -> psutil.Process:
        """The engine process: the child that is not multiprocessing's resource tracker."""
        children = psutil.Process(self.process.pid).children()
        return next(c for c in children if "resource_tracker" not in " ".join(c.cmdline()))

    def saved(self, like: str) -> list[tuple[str, str]]:
        """(state, content) of saved replies whose text is like this."""
        with sqlite3.connect(f"file:{self.data / 'glmui.db'}?mode=ro", uri=True) as connection:
            query = "SELECT state, content FROM messages WHERE role = 'assistant' AND content LIKE ?"
            rows = connection.execute(query, (like,)).fetchall()
        connection.close()
        return rows


@contextmanager
def running_app(data: Path, **given: str) -> Iterator[App]:
    """The app on a data folder, `given` in its environment. It must end soon, and without a traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        str(ROOT / "app.py"),
        "--no-browser",
        "--port",
        str(port),
        "--data-dir",
        str(data),
    ]
    environment = {**os.environ, "LANG": "C.UTF-8", "PYTHONWARNINGS": "default", **given}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    app = App(process, port, data)
    _wait_until_ready(app)
    yield app
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    out, _ = process.communicate(timeout=10)
    assert time.monotonic() - began < 5, "SIGTERM with pages open took too long"
    assert "Traceback" not in out
    log = (data / "logs" / "glmui.log").read_text(encoding="utf-8")
    assert "Traceback" not in log, log


def _wait_until_ready(app: App) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{app.address}glmui/whoami", timeout=5) as answer:
                if b'"ready": true' in answer.read().replace(b'":true', b'": true'):
                    return
        except OSError:
            pass
        assert app.process.poll() is None, app.process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError("the app did not come up")


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def page_context(browser: Browser, app: App, size: dict[str, int]) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport=size, locale="en-US")  # type: ignore[arg-type]
    context.on("request", lambda request: app.asked.append(request.url))
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


def opened(context: BrowserContext, app: App, path: str = "") -> Page:
    page = context.new_page()
    page.goto(app.address + path)
    page.locator("#box textarea").wait_for()
    expect(page.locator("#engine .chip")).to_be_visible(timeout=PATIENCE)
    return page


def say(page: Page, text: str) -> None:
    box = page.locator("#box textarea")
    box.fill(text)
    box.press("Enter")


def last_reply(page: Page) -> str:
    return page.locator("#thread .bot-row .message").last.inner_text()


def wait_for_text(page: Page, text: str | re.Pattern[str]) -> None:
    expect(page.locator("#thread .bot-row .message").last).to_contain_text(text, timeout=PATIENCE)


def wait_until_done(page: Page) -> None:
    expect(page.locator("#box .submit-button")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#status .busy")).to_have_count(0, timeout=PATIENCE)


def use_folder(page: Page, name: str) -> None:
    box = page.locator("#folder textarea, #folder input")
    if not box.is_visible():
        page.locator("#other > button").click()
    box.fill(name)
    page.locator("#use-folder").click()


def use_model(page: Page, name: str) -> None:
    use_folder(page, name)
    expect(page.locator("#engine .chip")).to_contain_text(Path(name).name, timeout=PATIENCE)
