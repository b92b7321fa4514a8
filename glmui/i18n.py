"""The interface's words: assets/locales/en.json and zh.json, looked up by dotted key."""

from __future__ import annotations

import json
import locale
import os
from functools import cache
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "zh")
_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "locales"


@cache
def table(language: str) -> dict[str, str]:
    """All texts of one language, flat: {"sidebar.title": "…"}."""
    tree = json.loads((_FOLDER / f"{language}.json").read_text(encoding="utf-8"))
    return dict(_flatten("", tree))


def _flatten(prefix: str, tree: dict[str, Any]) -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat += _flatten(f"{name}.", value) if isinstance(value, dict) else [(name, value)]
    return flat


def text(language: str, key: str, **values: Any) -> str:
    """The text of `key` in `language`, its {placeholders} filled.

    An unknown key comes back as itself, and a missing value leaves its placeholder standing:
    a gap in the words must never hide the error they were to tell of.
    """
    template = table(pick(language)).get(key) or table("en").get(key) or key
    return template.format_map(_Open(values))


class Words:
    """`words("list.new")` is that text in one language. below: what all its keys begin with ("cli.")."""

    def __init__(self, language: str, below: str = "") -> None:
        self.language = language
        self._below = below

    def __call__(self, key: str, **values: Any) -> str:
        return text(self.language, f"{self._below}{key}", **values)


class _Open(dict[str, Any]):
    def __missing__(self, name: str) -> str:
        return "{" + name + "}"


def pick(wish: str | None) -> str:
    """The language nearest to a wish such as "zh-CN,zh;q=0.9" (Accept-Language) or "zh_CN.UTF-8" (LANG)."""
    for part in (wish or "").replace("_", "-").lower().split(","):
        code = part.strip().split(";")[0].split("-")[0]
        if code in LANGUAGES:
            return code
    return "en"


def of_terminal() -> str:
    """The language of the terminal glmui was started from."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if value := os.environ.get(name):
            return pick(value)
    return pick(locale.getlocale()[0])
