"""Findings as text: aligned for a terminal, anonymous for whoever one asks for help, JSON for programs."""

from __future__ import annotations

import getpass
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from glmui import __version__, i18n
from glmui.doctor.finding import Finding
from glmui.tools.aligned import columns_of, padded

MARKS = {"ok": "✓", "warning": "!", "problem": "✗"}
_PLAIN = {"ok": "+", "warning": "!", "problem": "x"}
_WORST_LAST = {"ok": 0, "warning": 1, "problem": 2}
_SHORTEST_NAME = 3  # a user's name shorter than that is removed from paths only: it may be part of any word


def lines(findings: Sequence[Finding], language: str, encoding: str = "utf-8") -> list[str]:
    """A list with the worst at its end, where one looks first, each with what to do."""
    marks, arrow = (MARKS, "→") if _can_show("✓✗→", encoding) else (_PLAIN, "->")
    words = {status: i18n.text(language, f"doctor.status.{status}") for status in marks}
    word = max(map(columns_of, words.values()))
    title = max((columns_of(finding.title(language)) for finding in findings), default=0)
    margin = " " * (2 + word + 2 + title + 2)
    told = []
    for finding in sorted(findings, key=lambda finding: _WORST_LAST[finding.status]):
        begin = f"{marks[finding.status]} {padded(words[finding.status], word)}  "
        detail = finding.detail(language).replace("\n", f"\n{margin}")
        told.append(f"{begin}{padded(finding.title(language), title)}  {detail}")
        if cure := finding.cure(language):
            told.append(f"{margin}{arrow} {cure}")
    return [*told, "", summary(findings, language)]


def summary(findings: Iterable[Finding], language: str) -> str:
    """One sentence: how it stands."""
    found = [finding.status for finding in findings]
    problems, warnings = found.count("problem"), found.count("warning")
    key = "problems" if problems else "warnings" if warnings else "all_well"
    return i18n.text(language, f"doctor.summary.{key}", problems=problems, warnings=warnings)


def as_json(findings: Iterable[Finding], language: str) -> dict[str, Any]:
    return {
        "findings": [
            {"name": f.name, "status": f.status, "detail": f.detail(language), "cure": f.cure(language)}
            for f in findings
        ]
    }


def report(findings: Sequence[Finding], language: str) -> str:
    """All of it as text to hand on: with the versions, without the user's name and home folder."""
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    head = f"glmui {__version__} · Python {platform.python_version()} · {system}"
    return anonymous("\n".join([head, "", *lines(findings, language)]), Path.home(), _user())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return ""


def anonymous(text: str, home: Path, user: str) -> str:
    """The home folder as ~, and the user's name wherever else it stands as a word."""
    if len(home.parts) > 1:  # "/" would shorten every path there is
        for form in {str(home), home.as_posix()}:
            text = re.sub(rf"{re.escape(form)}(?![\w.-])", "~", text)
    if not user:
        return text
    name = re.escape(user)
    text = re.sub(rf"(?<=[/\\]){name}(?=[/\\]|\b)", "…", text)
    return re.sub(rf"\b{name}\b", "…", text) if len(user) >= _SHORTEST_NAME else text


def _can_show(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
