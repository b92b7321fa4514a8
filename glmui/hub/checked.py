"""Which files of a folder were found right, so that a restart need not read them all again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from glmui.durable import rewrite

NAME = ".checked.json"


@dataclass(frozen=True, slots=True)
class Mark:
    """confirmed: catalogue or source stated this hash. size, changed: of the file when it was read."""

    sha256: str
    confirmed: bool
    size: int
    changed: int  # nanoseconds


class Checked:
    """Kept in the folder itself. A file that was touched since counts as not checked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._marks = _read(folder / NAME)

    def get(self, path: str) -> Mark | None:
        mark = self._marks.get(path)
        try:
            stat = (self._folder / path).stat()
        except OSError:
            return None
        return mark if mark and (mark.size, mark.changed) == (stat.st_size, stat.st_mtime_ns) else None

    def add(self, path: str, sha256: str, confirmed: bool) -> None:
        stat = (self._folder / path).stat()
        self._marks[path] = Mark(sha256, confirmed, stat.st_size, stat.st_mtime_ns)
        marks = {path: asdict(mark) for path, mark in self._marks.items()}
        rewrite(self._folder / NAME, json.dumps(marks))


def _read(file: Path) -> dict[str, Mark]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {path: Mark(**values) for path, values in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
