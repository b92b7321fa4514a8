"""What is said under a reply beside its text, in a form that crosses the engine's pipe and can be stored.

Notes are a text, one note a line: a key of the locales' "notes", and its values as JSON where it has some.
"""

from __future__ import annotations

import json
from typing import Any

from glmui import i18n


def note(key: str, **values: Any) -> str:
    """One note."""
    return f"{key} {json.dumps(values)}" if values else key


def join(*notes: str) -> str:
    """Several notes as one text; those that are "" say nothing."""
    return "\n".join(filter(None, notes))


def left_out(rounds: int) -> str:
    """The note on the oldest rounds, where the model was not shown so many."""
    if not rounds:
        return ""
    return note("left_out_one") if rounds == 1 else note("left_out", rounds=rounds)


def words(notes: str, language: str) -> list[str]:
    """The sentence of each note in `language` ("en" or "zh")."""
    return [_words(line, language) for line in notes.splitlines() if line]


def _words(line: str, language: str) -> str:
    key, _, values = line.partition(" ")
    try:
        return i18n.text(language, f"notes.{key}", **(json.loads(values) if values else {}))
    except (ValueError, TypeError):  # the database was changed by somebody else
        return i18n.text(language, f"notes.{key}")
