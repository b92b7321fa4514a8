"""A service in a temporary folder: the real store, the scripted engine in this process, no page."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from glmui.chat import ChatService
from glmui.choice import Choice
from glmui.downloads import Downloads
from glmui.engine.echo import EchoEngine
from glmui.memory.forecast import Forecast, forecast
from glmui.meter import Meter, Reading
from glmui.settings import Settings
from glmui.store import Store, StoredMessage
from glmui.text import pieces
from glmui.types import ChatSettings, EngineSpec
from glmui.ui.desk import Desk
from glmui.ui.shelf import Shelf

ECHO = EngineSpec("echo", "echo")
BLIND = Reading((), None, None, None, "no_driver")


def foresee(spec: EngineSpec) -> Forecast | None:
    """The forecast for the machine that the scripted engine pretends, whatever this one is."""
    return forecast(spec, BLIND)


def echo_with_room(tokens: int) -> EngineSpec:
    """The scripted engine on a pretended card where a conversation may have about so many tokens."""
    for tenths in range(300, 900):
        spec = EngineSpec(f"echo vram={tenths / 100}", "echo", device="cuda")
        found = foresee(spec)
        if found and found.room >= tokens:
            return spec
    raise AssertionError("no card is large enough")


class Echo(EchoEngine):
    """The scripted engine with what the client of an engine process has besides."""

    closed = False

    def configure(self, spec: EngineSpec) -> None:
        self._spec = spec

    def set_idle_seconds(self, seconds: float) -> None:
        self.idle_seconds = seconds

    def close(self) -> None:
        self.closed = True


class World:
    def __init__(self, folder: Path, spec: EngineSpec | None = ECHO) -> None:
        self.folder = folder
        self.engine = Echo()
        self.store = Store.open(folder)
        self.spec = spec
        self.service = ChatService(
            self.store, self.engine, lambda: self.spec, lambda _: pieces.count, foresee
        )

    def desk(self, model: str = "echo", meter: Meter | None = None) -> Desk:
        """What the page of this world works with."""
        choice, meter = Choice(Settings(data_dir=self.folder, model=model)), meter or Meter()
        downloads = Downloads(lambda: choice.settings, choice.take_up)
        return Desk(self.service, choice, Shelf(self.service, choice, downloads, meter), meter)

    def conversation(self, settings: ChatSettings | None = None) -> str:
        return self.service.new_conversation(settings or ChatSettings()).id

    def answer(self, conversation: str) -> StoredMessage:
        """The last reply, once nothing is being written in the conversation any more."""
        wait_for(lambda: self.service.live(conversation) is None)
        return self.store.thread(conversation)[-1]


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until something is true; a test that waits in vain fails here."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
