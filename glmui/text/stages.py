"""The stages that a streaming detokeniser is made of, from ids to text that never changes once it is out.

Each keeps back only the end that what follows could still change; the cost is linear.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol


class Pieces(Protocol):
    """What a tokenizer tells of one id."""

    def piece(self, token: int) -> str | None: ...

    def byte(self, token: int) -> int | None: ...


class Stage(Protocol):
    def add(self, text: str) -> str: ...

    def finish(self) -> str: ...


def run(stages: tuple[Stage, ...], text: str) -> str:
    """What `text` lets out of stages that stand one behind the other."""
    for stage in stages:
        text = stage.add(text)
    return text


def finish(stages: tuple[Stage, ...], text: str) -> str:
    """The same for the last text, with all that was kept back."""
    for stage in stages:
        text = stage.add(text) + stage.finish()
    return text


def fill_training_time(text: str) -> str:
    """The placeholder the training texts had for their own date."""
    return text.replace("[[训练时间]]", "2023年")


class Rewrite:
    """Applies `change` to a stream, keeping back a tail that matches `live` until more text decides it.

    `change` may look at one character to the left of what it changes.
    """

    def __init__(self, live: str, change: Callable[[str], str], left: str = "") -> None:
        self._live = re.compile(rf"(?:{live})\Z")
        self._change = change
        self._held, self._left = "", left

    def add(self, text: str) -> str:
        text = self._held + text
        tail = self._live.search(text)
        cut = tail.start() if tail else len(text)
        self._held = text[cut:]
        return self._changed(text[:cut])

    def finish(self) -> str:
        held, self._held = self._held, ""
        return self._changed(held)

    def _changed(self, text: str) -> str:
        if not text:
            return ""
        changed = self._change(self._left + text)[len(self._left) :]
        self._left = text[-1]
        return changed


class Strip:
    """str.strip() of a stream; only its end where the stream goes on with a text."""

    def __init__(self, begun: bool) -> None:
        self._begun = begun
        self._blanks = ""

    def add(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        body = text.rstrip()
        if not body:
            self._blanks += text
            return ""
        blanks, self._blanks = self._blanks, text[len(body) :]
        return blanks + body

    def finish(self) -> str:
        return ""


class Characters:
    """Ids to text of whole characters, as sentencepiece joins pieces.

    While there is no text yet, each piece loses its leading "▁". Byte pieces are gathered to UTF-8
    characters; a byte that cannot belong to one becomes U+FFFD.
    """

    def __init__(self, pieces: Pieces, begun: bool) -> None:
        self._pieces = pieces
        self._bytes = b""
        self._begun = begun

    def add(self, token: int) -> str:
        byte = self._pieces.byte(token)
        if byte is not None:
            self._bytes += bytes([byte])
            return self._whole_characters(last=False)
        piece = self._pieces.piece(token)
        if piece is None:
            return ""
        text = self.finish()
        if not self._begun and not text:
            piece = piece.removeprefix("▁")
        self._begun |= bool(text or piece)
        return text + piece.replace("▁", " ")

    def finish(self) -> str:
        return self._whole_characters(last=True)

    def _whole_characters(self, last: bool) -> str:
        text = ""
        while self._bytes:
            character = _first_character(self._bytes)
            if character is None and not last and _may_still_grow(self._bytes):
                break
            self._bytes = self._bytes[len(character.encode()) if character else 1 :]
            text += character or "\ufffd"
        self._begun |= bool(text)
        return text


def _first_character(data: bytes) -> str | None:
    """The character `data` begins with, None where its bytes are not one."""
    first = data[0]
    length = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    try:
        return data[:length].decode("utf-8")
    except UnicodeDecodeError:
        return None


def _may_still_grow(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


def training_time() -> Rewrite:
    """The stage of fill_training_time."""
    return Rewrite(r"\[(?:\[(?:训(?:练(?:时(?:间\]?)?)?)?)?)?", fill_training_time)
