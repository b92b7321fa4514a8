"""Fetching the starter model in the background, one at a time, with a progress anybody may look at."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from glmui.errors import FetchError, GlmuiError
from glmui.hub.starter import ensure_starter
from glmui.types import Progress

log = logging.getLogger(__name__)


class Download:
    """`progress` while it runs, then `error` or a call of `done(folder)`."""

    def __init__(self, data_dir: Path, done: Callable[[Path], None]) -> None:
        self.progress: Progress | None = None
        self.error: GlmuiError | None = None
        self._data_dir = data_dir
        self._done = done
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin; does nothing while a download runs."""
        with self._lock:
            if self._thread and self._thread.is_alive():
                return
            self.error, self.progress = None, Progress("starting")
            self._cancelled.clear()
            self._thread = threading.Thread(target=self._run, name="download", daemon=True)
            self._thread.start()

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None:
        """Cancel and wait until nothing of it runs any more."""
        self.cancel()
        if self._thread:
            self._thread.join(timeout=2)

    def _run(self) -> None:
        try:
            self._done(ensure_starter(self._data_dir, self._show, self._cancelled.is_set))
        except GlmuiError as error:
            if not self._cancelled.is_set():
                self.error = error
                log.warning("fetching the starter failed: %s", error)
        except Exception as error:
            self.error = FetchError("internal", detail=repr(error))
            log.exception("fetching the starter failed")
        finally:
            self.progress = None

    def _show(self, progress: Progress) -> None:
        self.progress = progress
