"""ChatGLM-6B's replies: ids to the text a reader sees, whole or as a stream.

Published code decodes everything again at each step, so text can change behind the cursor. Here a
stream of small stages each keeps back only the end that what follows could still change (a broken
character, a blank before a mark, a mark before a Chinese character). What came out never changes,
all of it together equals `reply_text` of all ids, and the cost is linear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

from glmui.text.chatglm import ChatGLMTokenizer, clean_up, restore_blanks

_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_BESIDE_CHINESE = [
    (re.compile(pattern % re.escape(mark)), replacement % wide)
    for mark, wide in _FULL_WIDTH.items()
    for pattern, replacement in (("([\u4e00-\u9fff])%s", r"\1%s"), ("%s([\u4e00-\u9fff])", r"%s\1"))
]


def widen_marks(text: str) -> str:
    """Make , ! : ; ? full width where they touch a Chinese character."""
    for pattern, replacement in _BESIDE_CHINESE:
        text = pattern.sub(replacement, text)
    return text


def fill_training_time(text: str) -> str:
    """The placeholder the training texts had for their own date."""
    return text.replace("[[训练时间]]", "2023年")


def process_response(text: str) -> str:
    """What the published chat() does to a decoded reply before it is shown or kept in the history."""
    return widen_marks(fill_training_time(text.strip()))


def reply_text(tokenizer: ChatGLMTokenizer, ids: Sequence[int]) -> str:
    """The reply that `ids` are."""
    return process_response(tokenizer.decode(ids))


class _Stage(Protocol):
    def add(self, text: str) -> str: ...

    def finish(self) -> str: ...


class _Rewrite:
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


class _Strip:
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


class _Characters:
    """Ids to text of whole characters, as sentencepiece joins pieces.

    While there is no text yet, each piece loses its leading "▁". Byte pieces are gathered to UTF-8
    characters; a byte that cannot belong to one becomes U+FFFD.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, begun: bool) -> None:
        self._tokenizer = tokenizer
        self._bytes = b""
        self._begun = begun

    def add(self, token: int) -> str:
        byte = self._tokenizer.byte(token)
        if byte is not None:
            self._bytes += bytes([byte])
            return self._whole_characters(last=False)
        piece = self._tokenizer.piece(token)
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


class ChatGLMDetokeniser:
    """Feed ids one by one; get the reply's text piece by piece, whole characters only.

    before: the text that this reply goes on with, "" for a new one.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, before: str = "") -> None:
        self._characters = _Characters(tokenizer, begun=bool(before))
        self._stages: tuple[_Stage, ...] = (
            _Rewrite(r"<(?:n|\|(?:t|ta|tab|b\w{0,8})?\|?)?", restore_blanks),
            _Rewrite(r" {1,3}(?:n? ?'[ 'nvr]*|n? ?|[vr])", clean_up),
            _Strip(begun=bool(before)),
            _Rewrite(r"\[(?:\[(?:训(?:练(?:时(?:间\]?)?)?)?)?)?", fill_training_time),
            _Rewrite(r"[,!:;?]", widen_marks, left=before[-1:]),
        )

    def add(self, token: int) -> str:
        """What this id lets out: "" while it is undecided."""
        text = self._characters.add(token)
        for stage in self._stages:
            text = stage.add(text)
        return text

    def finish(self) -> str:
        """What was still kept back."""
        text = self._characters.finish()
        for stage in self._stages:
            text = stage.add(text) + stage.finish()
        return text
