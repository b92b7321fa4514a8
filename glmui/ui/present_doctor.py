"""The doctor's findings as HTML: a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from glmui import i18n
from glmui.doctor.finding import Finding
from glmui.doctor.report import MARKS, summary


def findings(found: Sequence[Finding], language: str) -> str:
    """What is wrong first, each with what to do; then all that is well, in small print."""
    cards = "".join(
        _card(finding, language)
        for status in ("problem", "warning")
        for finding in found
        if finding.status == status
    )
    rows = "".join(
        f"<dt>{escape(finding.title(language))}</dt><dd>{_lines(finding.detail(language))}</dd>"
        for finding in found
        if finding.status == "ok"
    )
    return (
        f'<div class="shelf findings"><p role="status" class="summary">{escape(summary(found, language))}</p>'
        + (f"<ul>{cards}</ul>" if cards else "")
        + f"<h3>{escape(i18n.text(language, 'doctor.well'))}</h3><dl>{rows}</dl></div>"
    )


def _card(finding: Finding, language: str) -> str:
    word = escape(i18n.text(language, f"doctor.status.{finding.status}"))
    return (
        f'<li class="{finding.status}"><div class="head"><h4>{escape(finding.title(language))}</h4>'
        f'<i class="tag">{MARKS[finding.status]} {word}</i></div>'
        f"<p>{_lines(finding.detail(language))}</p><p class='cure'>{escape(finding.cure(language))}</p></li>"
    )


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")
