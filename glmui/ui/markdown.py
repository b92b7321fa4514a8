"""Make text safe and honest to show as markdown: HTML stays visible as text, remote images become links."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

# Code and formulas are shown literally by the page: nothing inside them is touched.
_LITERAL = re.compile(
    r"(^ {0,3}(?P<fence>```+|~~~+).*?(?:^ {0,3}(?P=fence)[`~]*\s*?$|\Z)"  # fenced code, perhaps still growing
    r"|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)"  # inline code
    r"|\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)"  # display and inline formulas
    r"|\$(?=[^\s$])[^$\n]*?(?<=[^\s$])\$(?!\d))",
    re.DOTALL | re.MULTILINE,
)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_IMAGE = re.compile(r"!\[([^\]\n]*)\]\(\s*<?(https?:)?//([^)\s>]+)[^)\n]*\)")


def for_display(text: str) -> str:
    """Markdown in which no raw HTML and no remote image is left.

    `<b>` outside code is shown as the four characters it is; an image that would be fetched from
    another host becomes a link that names the host.
    """
    shown, end = [], 0
    for match in _LITERAL.finditer(text):
        shown += [_defused(text[end : match.start()]), match.group()]
        end = match.end()
    shown.append(_defused(text[end:]))
    return "".join(shown)


def _defused(prose: str) -> str:
    return _TAG.sub("&lt;", _IMAGE.sub(_chip, prose))


def _chip(match: re.Match[str]) -> str:
    label, scheme, rest = match.group(1), match.group(2) or "https:", match.group(3)
    url = f"{scheme}//{rest}"
    host = urlsplit(url).hostname or rest
    return f"[{label or host} ↗ {host}]({url})"
