"""A rough idea of tokens where there is no tokenizer: words, blanks, marks, and each Chinese character."""

from __future__ import annotations

import re
from collections.abc import Sequence

from glmui.types import Message

_PIECE = re.compile(r"[A-Za-z0-9]+|[^\S\n]+|\n|.")
_ROUND_COST = 4  # what a chat template spends on a message's frame


def split(text: str) -> list[str]:
    """Pieces that join to `text` again."""
    return _PIECE.findall(text)


def count(messages: Sequence[Message]) -> int:
    """Tokens of a prompt, in these pieces: the scripted engine's own count (a TokenCounter)."""
    return sum(len(split(m.content)) + _ROUND_COST for m in messages)
