"""A folder to make something in, which goes with its maker; what a killed one left goes with the next."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def workshop(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, gone at the end unless renamed. What killed runs left is removed first.

    Raises OSError.
    """
    sweep(parent, prefix)
    shop = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))
    try:
        yield shop
    finally:
        shutil.rmtree(shop, ignore_errors=True)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the workshops whose makers are no more."""
    for old in parent.glob(f"{glob.escape(prefix)}*"):
        pid = old.name.removeprefix(prefix).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
