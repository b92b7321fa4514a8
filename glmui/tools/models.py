"""`glmui models`: what is here and what can be had; get, import, verify, remove, restore."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmui import i18n
from glmui.errors import FetchError, GlmuiError, InvalidInput
from glmui.hub import catalogue, get, installed
from glmui.hub.catalogue import Offer
from glmui.hub.download import Control
from glmui.i18n import Words
from glmui.settings import Settings, make_data_folder
from glmui.tools.chat import Terminal
from glmui.types import Progress

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asked for. what: a model's name, or the folder to import."""

    action: str
    what: str = ""
    name: str = ""
    quantize: get.Quantize = "none"
    accept_licence: bool = False
    trust: bool = False
    now: bool = False
    as_json: bool = False


def run(wish: Wish, settings: Settings, language: str, ask: Callable[[str], str] | None = None) -> int:
    """Do it; the exit code. ask: reads an answer from whoever sits there; None where nobody does."""
    if wish.action != "list" and not wish.what:
        raise InvalidInput("models_what", action=wish.action)
    make_data_folder(settings.data_dir)
    return Models(wish, settings, Terminal(language), ask).run()


def ask_here() -> Callable[[str], str] | None:
    """`input`, where someone sits at the terminal."""
    return input if sys.stdin is not None and sys.stdin.isatty() else None


class Models:
    """One action, its words and its result."""

    def __init__(
        self, wish: Wish, settings: Settings, terminal: Terminal, ask: Callable[[str], str] | None
    ) -> None:
        self._wish = wish
        self._settings = settings
        self._data_dir = settings.data_dir
        self._terminal = terminal
        self._words = Words(terminal.language, "cli.models.")
        self._ask = None if wish.as_json else ask
        self._control = Control()

    def run(self) -> int:
        """Raises GlmuiError."""
        actions: dict[str, Callable[[], int]] = {
            "list": self._list,
            "get": self._get,
            "import": self._import,
            "verify": self._verify,
            "remove": self._remove,
            "restore": self._restore,
        }
        return actions[self._wish.action]()

    # What is here

    def _list(self) -> int:
        rows = entries(self._data_dir)
        if self._wish.as_json:
            self._print(rows)
            return 0
        width = max(len(row["name"]) for row in rows) + 2
        for row in rows:
            state = self._words(f"states.{row['state']}", gb=f"{row['bytes'] / 1e9:.1f}")
            self._terminal.write(f"{row['name']:<{width}}{row['bytes'] / 1e9:5.1f} GB  {state}")
            about = ", ".join(filter(None, (row["licence"], *self._known_as(row["name"]))))
            self._terminal.write(f"  ({about})\n" if about else "\n")
            if row["problem"]:
                self._terminal.write(f"  {row['problem'].message(self._terminal.language)}\n")
        self._terminal.say("cli.models.list_end", folder=installed.models_folder(self._data_dir))
        return 0

    def _known_as(self, name: str) -> list[str]:
        offered = any(offer.name == name for offer in catalogue.offers())
        return [i18n.text(self._terminal.language, f"models.{name}")] if offered else []

    # What takes a while

    def _get(self) -> int:
        offer = catalogue.offer(self._wish.what)
        here = (installed.models_folder(self._data_dir) / offer.name).is_dir()
        if not here:
            self._accept(offer)
        try:
            with self._stoppable():
                folder = get.get(offer.name, self._settings, self._show, self._control)
        except FetchError as error:
            if error.code != "fetch_cancelled" or not self._control.cancelled:
                raise
            self._terminal.say("cli.models.paused", name=offer.name)
            return INTERRUPTED
        return self._told("here_already" if here else "got", name=offer.name, folder=folder)

    def _accept(self, offer: Offer) -> None:
        """Raises InvalidInput("licence_not_accepted")."""
        if not offer.licence.accept or self._wish.accept_licence:
            return
        values = {"name": offer.name, "licence": offer.licence.name, "link": offer.licence.link}
        answer = self._ask(self._words("licence", **values)) if self._ask else ""
        if answer.strip().lower() not in ("y", "yes", "是", "同意"):
            raise InvalidInput("licence_not_accepted", **values)

    def _import(self) -> int:
        source = Path(self._wish.what).expanduser().absolute()
        name = self._wish.name or source.name
        try:
            with self._stoppable():
                folder = self._import_once(source, name, self._wish.trust)
        except InvalidInput as error:
            if error.code != "import_untrusted" or not self._trusts(source, name):
                raise
            with self._stoppable():
                folder = self._import_once(source, name, trusted=True)
        return self._told("imported", name=name, folder=folder)

    def _import_once(self, source: Path, name: str, trusted: bool) -> Path:
        return get.import_folder(
            source,
            name,
            self._data_dir,
            self._show,
            lambda: self._control.cancelled,
            self._wish.quantize,
            trusted,
        )

    def _trusts(self, source: Path, name: str) -> bool:
        """Whether the user confirms by typing the name that the model will have."""
        if self._ask is None:
            return False
        return self._ask(self._words("trust", folder=source, name=name)).strip() == name

    def _verify(self) -> int:
        with self._stoppable():
            problems = get.verify(
                self._wish.what, self._data_dir, self._show, lambda: self._control.cancelled
            )
        if self._wish.as_json:
            self._print({"name": self._wish.what, "whole": not problems, "problems": problems})
        elif not problems:
            self._terminal.say("cli.models.whole", name=self._wish.what)
        else:
            for problem in problems:
                self._terminal.write(f"{problem.message(self._terminal.language)}\n")
        return 1 if problems else 0

    # What is done at once

    def _remove(self) -> int:
        here = (installed.models_folder(self._data_dir) / self._wish.what).is_dir()
        if not here and get.half_fetched(self._wish.what, self._data_dir):
            get.forget_half_fetched(self._wish.what, self._data_dir)
            return self._told("forgotten", name=self._wish.what)
        get.remove(self._wish.what, self._data_dir, self._wish.now)
        return self._told("deleted" if self._wish.now else "removed", name=self._wish.what)

    def _restore(self) -> int:
        folder = get.restore(self._wish.what, self._data_dir)
        return self._told("restored", name=self._wish.what, folder=folder)

    # Words

    def _told(self, key: str, **values: Any) -> int:
        """The end, as a sentence or as JSON."""
        if self._wish.as_json:
            self._print({"done": key, **values})
        else:
            self._terminal.say(f"cli.models.{key}", **values)
        return 0

    def _print(self, values: Any) -> None:
        self._terminal.write(json.dumps(values, ensure_ascii=False, default=self._plain) + "\n")

    def _plain(self, value: object) -> object:
        """What JSON has no form for."""
        if isinstance(value, GlmuiError):
            return {"code": value.code, "message": value.message(self._terminal.language)}
        return str(value)

    def _show(self, progress: Progress) -> None:
        self._terminal.show_line(progress_line(progress, self._terminal.language))

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Ctrl+C ends what runs in an orderly way; what a download has is kept."""
        before = signal.signal(signal.SIGINT, lambda *_: self._control.cancel())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def entries(data_dir: Path) -> list[dict[str, Any]]:
    """Every model that is here, that can be had, and that lies in the trash; state tells which."""
    here = [
        {
            "name": model.name,
            "state": "damaged" if model.problem else "here",
            "bytes": model.size,
            "licence": model.licence,
            "quantize": model.quantize,
            "date": model.date,
            "problem": model.problem,
        }
        for model in installed.everything(data_dir)
    ]
    names = {row["name"] for row in here}
    return [
        *here,
        *(_offered(offer, data_dir) for offer in catalogue.offers() if offer.name not in names),
        *(_entry(entry.name, "removed", entry.size) for entry in get.removed(data_dir)),
    ]


def _offered(offer: Offer, data_dir: Path) -> dict[str, Any]:
    fetched = get.half_fetched(offer.name, data_dir)
    size = fetched or round(offer.download_gb * 1e9)
    return _entry(offer.name, "begun" if fetched else "offered", size, offer.licence.name)


def _entry(name: str, state: str, size: int, licence: str = "") -> dict[str, Any]:
    empty = {"quantize": "", "date": "", "problem": None}
    return {"name": name, "state": state, "bytes": size, "licence": licence, **empty}


def progress_line(progress: Progress, language: str) -> str:
    """ "fetching 41 %, 1.6 of 3.9 GB, 12.3 MB/s, 3:10 left"."""
    say = Words(language, "cli.")
    parts = [say(f"stages.{progress.stage}")]
    if progress.fraction is not None:
        parts[0] += f" {progress.fraction:.0%}"
    if progress.total:
        parts.append(
            say("models.amount", done=f"{progress.done / 1e9:.2f}", total=f"{progress.total / 1e9:.2f}")
        )
    if progress.per_second > 0:
        minutes, seconds = divmod(round((progress.total - progress.done) / progress.per_second), 60)
        parts.append(say("models.speed", speed=f"{progress.per_second / 1e6:.1f}"))
        parts.append(say("models.left", time=f"{minutes}:{seconds:02}"))
    return ", ".join(parts)
