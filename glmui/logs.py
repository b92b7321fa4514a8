"""The log file: logs/glmui.log in the data folder, for this account alone, without anything anyone wrote."""

from __future__ import annotations

import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

from glmui.errors import StoreError

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_MOST_BYTES, _KEPT = 2 * 2**20, 3


def start(data_dir: Path, level: str) -> logging.Handler:
    """Send every logger to the file, at "debug" to the terminal too. Give the handler to `stop` at the end.

    glmui's own loggers speak from `level` on; libraries only from "warning" on, because what they say at
    lower levels may hold pieces of messages. Raises StoreError when the file cannot be opened.
    """
    folder = data_dir / "logs"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        handler = _PrivateFile(
            folder / "glmui.log", maxBytes=_MOST_BYTES, backupCount=_KEPT, encoding="utf-8"
        )
    except OSError as error:
        raise StoreError("data_folder_unwritable", folder=folder, detail=error.strerror or error) from error
    handler.setFormatter(logging.Formatter(_FORMAT))
    logging.getLogger().addHandler(handler)
    logging.getLogger("glmui").setLevel(level.upper())
    if level == "debug":
        logging.getLogger("glmui").addHandler(logging.StreamHandler(sys.stderr))
    logging.captureWarnings(True)
    return handler


def stop(handler: logging.Handler) -> None:
    """Undo `start`."""
    logging.captureWarnings(False)
    logging.getLogger("glmui").handlers.clear()
    logging.getLogger("glmui").setLevel(logging.NOTSET)
    logging.getLogger().removeHandler(handler)
    handler.close()


class _PrivateFile(RotatingFileHandler):
    """Every file it opens, the rotated ones too, is 0600 from its first moment."""

    def _open(self) -> IO[Any]:  # type: ignore[override]
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=_private)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
