"""Files that outlive a power cut: their content is on the disk before they have their name."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def settle(draft: Path, file: Path) -> None:
    """Give a finished, flushed file its name for good."""
    draft.replace(file)
    flush_folder(file.parent)


def flush_folder(folder: Path) -> None:
    """Make the names in it last. Windows has no such call, and some file systems refuse it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
