"""Files that outlive a power cut: their content is on the disk before they have their name."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def settle(draft: Path, file: Path) -> None:
    """Give a finished, flushed file its name for good."""
    draft.replace(file)
    flush_folder(file.parent)


def rewrite(file: Path, text: str) -> None:
    """Replace a small file's text at once: after a power cut it is the old or the new one."""
    draft = file.with_name(f"{file.name}.new")
    draft.write_text(text, encoding="utf-8")
    flush(draft)
    draft.replace(file)


def flush(file: Path) -> None:
    """Put a file's content on the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def flush_folder(folder: Path) -> None:
    """Make the names in it last. Windows has no such call, and some file systems refuse it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
