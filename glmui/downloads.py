"""Fetching, importing and checking a model, in the background: one task at a time, seen by every page."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from glmui.errors import Busy, FetchError, GlmuiError, InvalidInput, NotFound
from glmui.hub import get as hub
from glmui.hub.download import Control
from glmui.settings import Settings
from glmui.types import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Import:
    """A folder of the user's own, as it was typed, that is to become the model `name`.

    trusted: the user has confirmed, by typing, files whose hashes nobody knows.
    """

    source: str
    name: str
    quantize: hub.Quantize = "none"
    trusted: bool = False


@dataclass(slots=True)
class Task:
    """What is being done for a model, or was done last.

    choose: the model is to be used once it is there. error: why it failed. problems: what a check found.
    ended: seconds since 1970, 0 while it runs.
    """

    kind: Literal["get", "import", "verify"]
    name: str
    choose: bool = False
    wish: Import | None = None
    progress: Progress = field(default_factory=lambda: Progress("starting"))
    cancelled: bool = False
    error: GlmuiError | None = None
    problems: tuple[GlmuiError, ...] = ()
    ended: float = 0.0


class Downloads:
    """Runs one task at a time. `task` tells of it while it runs and afterwards, `checks` of every check."""

    def __init__(self, settings: Callable[[], Settings], done: Callable[[str, bool], None]) -> None:
        """done(name, choose) is called, in the task's thread, once a fetched or imported model is there."""
        self.task: Task | None = None
        self.checks: dict[str, Task] = {}
        self._settings = settings
        self._done = done
        self._control = Control()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def running(self) -> Task | None:
        """The task, while it runs."""
        task = self.task
        return task if task and not task.ended else None

    @property
    def paused(self) -> bool:
        return self.running is not None and self._control.paused

    def get(self, name: str, choose: bool = False) -> None:
        """Fetch an offered model, from where an earlier try ended. Raises Busy("task_running")."""
        self._start(Task("get", name, choose), self._get)

    def bring_in(self, wish: Import, choose: bool = False) -> None:
        """Import a folder. Where its hashes are unknown, the task ends in "import_untrusted". Raises Busy."""
        self._start(Task("import", wish.name, choose, wish), self._import)

    def verify(self, name: str) -> None:
        """Compare a model's files with what they were; the result stands in `checks`. Raises Busy."""
        self._start(Task("verify", name), self._verify)

    def pause(self) -> None:
        self._control.pause()

    def resume(self) -> None:
        self._control.resume()

    def cancel(self) -> None:
        """End the task soon. What it has fetched stays, and `get` goes on from there."""
        if task := self.running:
            task.cancelled = True
        self._control.cancel()

    def forget(self, name: str) -> None:
        """Delete what a broken-off fetch left. Raises Busy while one runs for that model."""
        with self._lock:
            if self.running and self.running.name == name:
                raise Busy("task_running", name=name)
            hub.forget_half_fetched(name, self._settings().data_dir)
            if self.task and self.task.name == name:
                self.task = None

    def dismiss(self) -> None:
        """Tell no more of the last task."""
        with self._lock:
            if not self.running:
                self.task = None

    def close(self) -> None:
        """Cancel and wait until nothing of it runs any more."""
        self.cancel()
        if self._thread:
            self._thread.join(timeout=2)

    def _start(self, task: Task, work: Callable[[Task, Control], None]) -> None:
        with self._lock:
            if now := self.running:
                raise Busy("task_running", name=now.name)
            self.task, self._control = task, Control()
            self._thread = threading.Thread(
                target=self._run, args=(task, work, self._control), name="download", daemon=True
            )
            self._thread.start()

    def _run(self, task: Task, work: Callable[[Task, Control], None], control: Control) -> None:
        try:
            work(task, control)
        except GlmuiError as error:
            if not task.cancelled:
                task.error = error
                log.warning("%s of %s failed: %s", task.kind, task.name, error)
        except Exception as error:
            task.error = FetchError("internal", detail=repr(error))
            log.exception("%s of %s failed", task.kind, task.name)
        finally:
            task.ended = time.time()

    def _get(self, task: Task, control: Control) -> None:
        hub.get(task.name, self._settings(), _teller(task), control)
        self._done(task.name, task.choose)

    def _import(self, task: Task, control: Control) -> None:
        wish, cancelled = task.wish, lambda: control.cancelled
        assert wish is not None
        folder = self._settings().data_dir
        hub.import_folder(
            local_folder(wish.source),
            wish.name,
            folder,
            _teller(task),
            cancelled,
            wish.quantize,
            wish.trusted,
        )
        self._done(task.name, task.choose)

    def _verify(self, task: Task, control: Control) -> None:
        folder = self._settings().data_dir
        task.problems = tuple(hub.verify(task.name, folder, _teller(task), lambda: control.cancelled))
        if not task.cancelled:
            self.checks[task.name] = task


def local_folder(text: str) -> Path:
    """The folder a reader typed, on this computer. Raises InvalidInput("folder_not_local"), NotFound."""
    text = text.strip().strip('"').strip()
    refuse_elsewhere(text)
    folder = Path(text).expanduser()
    if not text or not folder.is_dir():
        raise NotFound("model_no_folder", folder=text)
    return folder.resolve()


def refuse_elsewhere(text: str) -> None:
    """Raise InvalidInput("folder_not_local") for an address of the web and for another computer's share: to
    look at one would be to go out."""
    if "://" in text or text.replace("\\", "/").startswith("//"):
        raise InvalidInput("folder_not_local")


def _teller(task: Task) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        task.progress = progress

    return tell
