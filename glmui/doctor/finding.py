"""What one look found, as a plain value; its words stand in the locales under "doctor"."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from glmui import i18n
from glmui.errors import GlmuiError

_LAUNCHER = "launch.bat" if sys.platform == "win32" else "./launch.sh"

Status = Literal["ok", "warning", "problem"]
Mend = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one thing.

    name: what was looked at, a key of the locales' "doctor.names". key: of "doctor.found" (what is so), and
    unless all is well of "doctor.cures" (the one thing to do). values: fill the sentences' placeholders; an
    error of the family among them says its own sentence, and so does a function of the language.
    mend: puts it right without losing anything, and "doctor.mended" has the key that tells so; or None.
    """

    name: str
    status: Status
    key: str
    values: Mapping[str, Any] = field(default_factory=dict)
    mend: Mend | None = None

    def title(self, language: str) -> str:
        return i18n.text(language, f"doctor.names.{self.name}")

    def detail(self, language: str) -> str:
        return self._say(language, "found")

    def cure(self, language: str) -> str:
        """What to do, or "" where nothing needs to be done."""
        return "" if self.status == "ok" else self._say(language, "cures")

    def mended(self, language: str) -> str:
        return self._say(language, "mended")

    def _say(self, language: str, section: str) -> str:
        values = {name: _worded(value, language) for name, value in self.values.items()}
        return i18n.text(language, f"doctor.{section}.{self.key}", **{"launcher": _LAUNCHER, **values})


def _worded(value: object, language: str) -> object:
    if isinstance(value, GlmuiError):
        return value.message(language)
    return value(language) if callable(value) else value


def gb(count: float) -> str:
    """Bytes as a number of GB."""
    return f"{count / 1e9:.1f}"


def ok(name: str, key: str, **values: Any) -> Finding:
    return Finding(name, "ok", key, values)


def warning(name: str, key: str, mend: Mend | None = None, **values: Any) -> Finding:
    """Something glmui can live with."""
    return Finding(name, "warning", key, values, mend)


def problem(name: str, key: str, mend: Mend | None = None, **values: Any) -> Finding:
    """Something that keeps glmui, or the chosen model, from working."""
    return Finding(name, "problem", key, values, mend)
