"""Ids in, text out, while a reply grows: only whole characters, at a cost linear in the number of ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
_LONGEST = 4  # bytes of the longest UTF-8 character, and so the most ids that one character can take
_PATIENCE = 2 * _LONGEST


class StreamingDetokeniser:
    """Feed ids, get the text they add. What all calls return, joined, is `decode` of all ids.

    decode: the tokenizer's own decode of a list of ids. Only the last few ids are ever decoded again, since a
    character may be spread over several and a word's blank depends on what stands before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._said: list[int] = []  # the newest ids whose text is out; they give `_held` its context
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain now, often "" in the middle of a character."""
        self._held.append(token)
        text = self._decode(self._said + self._held)
        if not text.endswith(_BROKEN):
            return self._say(text, len(self._held))
        return self._give_up_waiting(text) if len(self._held) >= _PATIENCE else ""

    def finish(self) -> str:
        """The rest, a broken character included."""
        return self._say(self._decode(self._said + self._held), len(self._held)) if self._held else ""

    def _say(self, text: str, count: int) -> str:
        before = self._decode(self._said)
        self._said, self._held = self._held[:count], self._held[count:]
        return text[len(before) :]

    def _give_up_waiting(self, text: str) -> str:
        """So many ids cannot be one character: say what those before the last few give for certain."""
        latest = len(self._held) - _LONGEST
        for count in range(latest, latest - _LONGEST, -1):
            part = self._decode(self._said + self._held[:count])
            if text.startswith(part):  # what came later left it as it was, so it stays
                return self._say(part, count)
        return ""
