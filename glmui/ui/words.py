"""The words of one language, as a function."""

from __future__ import annotations

from typing import Any

from glmui import i18n


class Words:
    """`words("list.new")` is that text in the language the page was built for."""

    def __init__(self, language: str) -> None:
        self.language = language

    def __call__(self, key: str, **values: Any) -> str:
        return i18n.text(self.language, key, **values)
