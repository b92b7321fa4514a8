"""Where the published reference data lies: beside the repository, on the machines that have it."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "reference"


def reference(name: str) -> Path:
    """A file of the reference data. Skips the test where there is none of it, and fails it where the
    folder is there but the file cannot be read: a test must not pass by losing its data."""
    if not FOLDER.is_dir():
        pytest.skip("the published reference data (../shared/reference) is not here")
    file = FOLDER / name
    with file.open("rb") as opened:
        opened.read(1)
    return file
