"""The models that are here and those that can be had: one look at them, and what their buttons do."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from glmui.chat import ChatService
from glmui.choice import Choice
from glmui.downloads import Downloads, Import, local_folder
from glmui.errors import Busy, InvalidInput
from glmui.hub import catalogue, installed
from glmui.hub import get as hub
from glmui.hub.catalogue import Offer
from glmui.hub.installed import InstalledModel
from glmui.meter import Meter, Reading
from glmui.ui.inventory import Entry, Look, Need, State, needs_of

LOOK_SECONDS = 1.0  # pages that ask within that time see the same look at the disk
QUANTIZE: tuple[hub.Quantize, ...] = get_args(hub.Quantize)

_Seen = tuple[float, list[InstalledModel], list[hub.Removed]]  # when, and what the disk held


@dataclass(slots=True)
class Shelf:
    """Collaborators of the Models area. The acts raise GlmuiError."""

    service: ChatService
    choice: Choice
    downloads: Downloads
    meter: Meter
    _seen: _Seen = field(default_factory=lambda: (-LOOK_SECONDS, [], []))
    _was_chosen: set[str] = field(default_factory=set)  # removed while they were the model in use

    @property
    def data_dir(self) -> Path:
        return self.choice.settings.data_dir

    # Looking

    def look(self, reading: Reading | None = None) -> Look:
        """reading: of the memory just now, where somebody has one."""
        memory = reading or self.meter.read(self.service.engine.info().pid)
        models, removed = self._on_disk()
        offers = {offer.name: offer for offer in catalogue.offers()}
        here = [self._here(model, offers.get(model.name), memory) for model in models]
        away = [offer for offer in offers.values() if offer.name not in {model.name for model in models}]
        return Look(
            installed.models_folder(self.data_dir),
            shutil.disk_usage(self.data_dir).free,
            memory,
            tuple(here),
            tuple(self._away(offer, memory) for offer in away),
            tuple(removed),
            self.downloads.task,
            self.downloads.paused,
            dict(self.downloads.checks),
        )

    def names(self) -> list[str]:
        """The models that are here."""
        return [model.name for model in self._on_disk()[0]]

    def _on_disk(self) -> tuple[list[InstalledModel], list[hub.Removed]]:
        seen = self._seen
        if time.monotonic() - seen[0] > LOOK_SECONDS:
            with suppress(OSError):  # a folder that vanishes just now: the next look will tell
                seen = time.monotonic(), installed.everything(self.data_dir), hub.removed(self.data_dir)
                self._seen = seen
        return seen[1], seen[2]

    def _here(self, model: InstalledModel, offer: Offer | None, memory: Reading) -> Entry:
        needs = self._needs(offer, memory) if offer else ()
        return Entry(model.name, self._state(model), offer, model, needs=needs)

    def _state(self, model: InstalledModel) -> State:
        if model.problem:
            return "damaged"
        info = self.service.engine.info()
        if info.model == model.name and info.state in ("loading", "ready"):
            return "loaded"
        return "chosen" if self.choice.settings.model == model.name else "here"

    def _away(self, offer: Offer, memory: Reading) -> Entry:
        task, fetched = self.downloads.running, 0
        if task is None or task.name != offer.name:
            with suppress(OSError):
                fetched = hub.half_fetched(offer.name, self.data_dir)
        state: State = "half" if fetched else "offered"
        return Entry(offer.name, state, offer, fetched=fetched, needs=self._needs(offer, memory))

    def _needs(self, offer: Offer, memory: Reading) -> tuple[Need, ...]:
        return needs_of(offer, memory, self.service.engine.info())

    # Acting

    def act(self, act: str, name: str, values: Mapping[str, str], choose: bool = False) -> None:
        """What a button says, for the model it stands at. choose: the model is then to be used.

        Raises InvalidInput where there is no such act.
        """
        acts: dict[str, Callable[[], None]] = {
            "get": lambda: self.get(name, bool(values.get("accept")), choose),
            "renew": lambda: self.renew(name),
            "pause": self.downloads.pause,
            "resume": self.downloads.resume,
            "cancel": self.downloads.cancel,
            "forget": lambda: self.downloads.forget(name),
            "dismiss": self.downloads.dismiss,
            "verify": lambda: self.downloads.verify(name),
            "remove": lambda: self.remove(name),
            "restore": lambda: self.restore(name),
            "use": lambda: self.use(name),
            "import": lambda: self.bring_in(values, choose),
            "open": lambda: self.open(values.get("folder", "")),
            "trust": lambda: self.trust(values.get("typed", "")),
        }
        if act not in acts:
            raise InvalidInput("path_closed")
        try:
            acts[act]()
        finally:
            self._seen = (-LOOK_SECONDS, *self._seen[1:])  # look afresh

    def get(self, name: str, accepted: bool, choose: bool) -> None:
        """Fetch a model. Raises InvalidInput("licence_not_accepted"), Busy."""
        offer, task = catalogue.offer(name), self.downloads.task
        begun = bool(hub.half_fetched(name, self.data_dir)) or (task is not None and task.name == name)
        if offer.licence.accept and not accepted and not begun:
            raise InvalidInput("licence_not_accepted")
        self.downloads.get(name, choose or (begun and task is not None and task.choose))

    def renew(self, name: str) -> None:
        """Fetch a damaged model again; what was there can still be brought back."""
        catalogue.offer(name)
        if now := self.downloads.running:
            raise Busy("task_running", name=now.name)
        chosen = self.choice.settings.model == name
        self.remove(name)
        self.downloads.get(name, chosen)

    def use(self, name: str) -> None:
        installed.inside(name, self.data_dir)
        self.choice.change(model=name)

    def open(self, folder: str) -> None:
        """Use a model where it lies. Raises InvalidInput, NotFound, ModelError."""
        self.choice.change(model=str(local_folder(folder)))

    def remove(self, name: str) -> None:
        """Put a model into the trash. Raises Busy while it answers or something is done for it."""
        task = self.downloads.running
        if task and task.name == name:
            raise Busy("task_running", name=name)
        if self.service.engine.info().model == name:
            if self.service.running():
                raise Busy("model_answering")
            self.service.engine.unload()
        hub.remove(name, self.data_dir)
        self.downloads.checks.pop(name, None)
        if self.choice.settings.model == name:
            self._was_chosen.add(name)
            self.choice.change(model="")

    def restore(self, name: str) -> None:
        """Bring the model back; it is used again where it was and no other is by now."""
        hub.restore(name, self.data_dir)
        if name in self._was_chosen and not self.choice.settings.model:
            self.choice.change(model=name)
        self._was_chosen.discard(name)

    def bring_in(self, values: Mapping[str, str], choose: bool) -> None:
        """Import the folder that was typed; what is wrong with it is told in its place. Raises Busy."""
        source = values.get("folder", "").strip().strip('"').rstrip("/\\")
        name = values.get("name", "").strip() or plain_name(source)
        wished = values.get("quantize")
        quantize: hub.Quantize = next((bits for bits in QUANTIZE if bits == wished), "none")
        self.downloads.bring_in(Import(source, name, quantize), choose)

    def trust(self, typed: str) -> None:
        """Go on with an import whose hashes nobody knows. Raises InvalidInput unless its name was typed."""
        task = self.downloads.task
        if task is None or task.wish is None:
            return
        wish = task.wish
        if typed.strip() != wish.name:
            raise InvalidInput("typed_differs", name=wish.name)
        self.downloads.bring_in(Import(wish.source, wish.name, wish.quantize, trusted=True), task.choose)


def plain_name(folder: str) -> str:
    """A model's name made of its folder's: what may stand in one is kept, the rest becomes a dash."""
    last = folder.replace("\\", "/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:64] or "model"
