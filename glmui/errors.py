"""What can go wrong, as one small family.

    GlmuiError                 exit 1, HTTP 500
    ├── InvalidInput           exit 2, HTTP 400   the request itself is wrong
    ├── NotFound               exit 1, HTTP 404   no such conversation, model, file
    ├── Busy                   exit 1, HTTP 429   too many are waiting; try again
    ├── ModelError             exit 1, HTTP 400   this folder or file is not a model we can open
    ├── EngineError            exit 1, HTTP 503   the engine process cannot answer now
    ├── StoreError             exit 1, HTTP 500   the database or its disk refuses
    └── FetchError             exit 1, HTTP 502   something could not be fetched

An error is a code and plain values. The sentence (what happened, what to do) stands in
assets/locales/*.json under "errors", so the page, the command line and the API all say it in
the reader's language, and an error crosses the engine's pipe as two plain values.
"""

from __future__ import annotations

from typing import Any

from glmui import i18n


class GlmuiError(Exception):
    """Base of every error meant for a reader.

    `code` names a sentence in the locales; `values` fill its placeholders. One that is itself words is a
    function of the language. Where a code has several sentences, `case` among the values names one of
    them: "errors.CODE_cases.CASE".
    """

    exit_code = 1
    status = 500

    def __init__(self, code: str, **values: Any) -> None:
        super().__init__(code, values)
        self.code = code
        self.values = values

    def message(self, language: str = "en") -> str:
        """The sentence in `language` ("en" or "zh")."""
        values = {name: value(language) if callable(value) else value for name, value in self.values.items()}
        case = values.get("case")
        key = f"errors.{self.code}_cases.{case}" if case else f"errors.{self.code}"
        return i18n.text(language, key, **values)

    def __str__(self) -> str:
        return self.message()


class InvalidInput(GlmuiError):
    exit_code = 2
    status = 400


class NotFound(GlmuiError):
    status = 404


class Busy(GlmuiError):
    status = 429


class ModelError(GlmuiError):
    status = 400


class EngineError(GlmuiError):
    status = 503


class StoreError(GlmuiError):
    pass


class FetchError(GlmuiError):
    status = 502


def to_values(error: GlmuiError) -> tuple[str, str, dict[str, Any]]:
    """(class name, code, values): what crosses a pipe. Values become plain strings and numbers."""
    values = {k: v if isinstance(v, (int, float)) else str(v) for k, v in error.values.items()}
    return type(error).__name__, error.code, values


def from_values(kind: str, code: str, values: dict[str, Any]) -> GlmuiError:
    """The error that `to_values` took apart."""
    family: list[type[GlmuiError]] = [GlmuiError, *GlmuiError.__subclasses__()]
    return next((c for c in family if c.__name__ == kind), GlmuiError)(code, **values)
