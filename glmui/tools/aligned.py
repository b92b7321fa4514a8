"""Rows of a table, lined up for a terminal: Chinese characters take two columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """One line for each row: the first cell to the left, the others, which are figures, to the right."""
    table = [list(row) for row in rows]
    widths = [max(map(columns_of, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        gaps = [" " * (width - columns_of(cell)) for cell, width in zip(row, widths, strict=True)]
        first, *others = [(cell, gap) for cell, gap in zip(row, gaps, strict=True)]
        lines.append("  ".join(["".join(first), *(gap + cell for cell, gap in others)]).rstrip())
    return lines


def padded(text: str, width: int) -> str:
    """The text with blanks behind it, up to `width` columns."""
    return text + " " * (width - columns_of(text))


def columns_of(text: str) -> int:
    """How wide a terminal shows a text."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
