"""Make text safe and honest to show as markdown.

Outside code and formulas, HTML stays visible as the characters it is, images become links (nothing is
fetched by looking at a reply), and a dollar sign that begins no formula is only a dollar sign. The page's
copy button undoes this (assets/glmui.js).

One pass over the marks that matter, and look-ups by bisection: linear in the text's length, whatever a
text may hold, since a page lays a reply out again and again.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from urllib.parse import urlsplit

_MARK = re.compile(
    r"(?P<fence>^ {0,3}(?:`{3,}|~{3,}))|(?P<ticks>`+)|(?P<dollars>\$+)|(?P<bracket>\\[\[\]()])"
    r"|(?P<escape>\\.)|(?P<tag><(?=[A-Za-z/!?]))|(?P<image>!\[)",
    re.MULTILINE | re.DOTALL,
)
_IMAGE = re.compile(r"!\[([^\[\]\n]{0,200})\]\(\s{0,9}<?((?:https?:)?//[^\s<>()]{1,2000})>?[^()\n]{0,200}\)")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_CLOSING = {"\\(": "\\)", "\\[": "\\]", "$$": "$$", "$": "$"}


def for_display(text: str) -> str:
    """Markdown without raw HTML, without images, and with every code block closed."""
    return "".join(_Scanner(text).parts())


# For what does not change any more: it is shown again at every piece of the reply below it.
kept_for_display = lru_cache(maxsize=512)(for_display)


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.open_fence = ""
        self.marks = list(_MARK.finditer(text))
        self.blank_lines = [m.start() for m in _BLANK_LINE.finditer(text)]
        self.places: dict[str, list[int]] = defaultdict(list)  # where each mark stands, in order
        for mark in self.marks:
            self.places[mark.group().strip()].append(mark.start())

    def parts(self) -> Iterator[str]:
        done = 0
        for mark in self.marks:
            if mark.start() < done:
                continue  # inside code, a formula or a link that is already shown
            yield self.text[done : mark.start()]
            end = self.end_of_literal(mark)
            if end is not None:
                yield self.text[mark.start() : end]
                done = end
            else:
                shown, done = self.defused(mark)
                yield shown
        yield self.text[done:]
        if self.open_fence:
            yield f"\n{self.open_fence}"

    def end_of_literal(self, mark: re.Match[str]) -> int | None:
        """Where the code or formula that begins at this mark ends, or None where none begins."""
        sign = mark.group()
        if mark.lastgroup == "fence":
            return self.end_of_fence(mark)
        if mark.lastgroup == "ticks":
            return self.closing(mark.end(), sign, within_paragraph=True)
        if mark.lastgroup == "dollars":
            return self.end_of_dollars(mark) if len(sign) <= 2 else None
        if mark.lastgroup == "bracket" and sign in _CLOSING:
            return self.closing(mark.end(), _CLOSING[sign], within_paragraph=sign == "\\(")
        return mark.end() if mark.lastgroup in ("bracket", "escape") else None

    def end_of_fence(self, mark: re.Match[str]) -> int:
        fence = mark.group().strip()
        line = self.text.find("\n", mark.end())
        if fence[0] == "`" and "`" in self.text[mark.end() : line if line >= 0 else None]:
            return mark.end()  # markdown takes this for inline code; leaving it alone hurts nobody
        for place in range(bisect_left(self.marks, mark.end(), key=re.Match.start), len(self.marks)):
            other = self.marks[place]
            found = other.group().strip()
            if other.lastgroup == "fence" and found[0] == fence[0] and len(found) >= len(fence):
                end = self.text.find("\n", other.end())
                end = len(self.text) if end < 0 else end
                if not self.text[other.end() : end].strip():
                    return end
        self.open_fence = fence
        return len(self.text)

    def end_of_dollars(self, mark: re.Match[str]) -> int | None:
        """`$x$` is a formula when no blank stands inside its dollars, no digit after and no newline in it."""
        sign = mark.group()
        end = self.closing(mark.end(), sign, within_paragraph=True)
        if end is None or sign == "$$":
            return end
        inside, after = self.text[mark.end() : end - 1], self.text[end : end + 1]
        formula = inside and inside == inside.strip() and "\n" not in inside and not after.isdigit()
        return end if formula else None

    def closing(self, start: int, sign: str, within_paragraph: bool) -> int | None:
        """The end of the next `sign` from `start` on."""
        places = self.places.get(sign, [])
        at = bisect_left(places, start)
        if at == len(places):
            return None
        blank = bisect_left(self.blank_lines, start)
        if within_paragraph and blank < len(self.blank_lines) and self.blank_lines[blank] < places[at]:
            return None
        return places[at] + len(sign)

    def defused(self, mark: re.Match[str]) -> tuple[str, int]:
        """A mark that begins nothing literal: what to show, and where the text goes on."""
        if mark.lastgroup == "tag":
            return "&#60;", mark.end()
        if mark.lastgroup == "dollars":
            return "".join("<span>&#36;</span>" for _ in mark.group()), mark.end()
        if mark.lastgroup == "image":
            if image := _IMAGE.match(self.text, mark.start()):
                return _chip(*image.groups()), image.end()
            return "&#33;[", mark.end()
        return mark.group(), mark.end()


def _chip(label: str, url: str) -> str:
    """A link in the image's place that names the host it would have been fetched from."""
    url = url if url.startswith("http") else f"https:{url}"
    host = urlsplit(url).hostname or url
    return f"[{for_display(label) or host} ↗ {host}]({url})"
