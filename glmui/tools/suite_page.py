"""The suite's result as one self-contained HTML page: the table, bars, and memory over the rounds."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from string import Template

from glmui.tools.suite_results import ROWS, Column, Say, notes, shown, title

_TEMPLATE = Path(__file__).resolve().parent.parent.parent / "assets" / "bench.html"
_BARS = ("load_again", "memory", "short_first", "long")
_WIDTH, _BAR, _NAME = 420, 26, 84  # pixels of a plot, of a bar's row, and of the names beside the bars
_HEIGHT = 150  # of the plot of lines


def page(columns: list[Column], say: Say, language: str) -> str:
    """The whole page; it loads nothing from anywhere."""
    plots = [bars(say(f"bench.suite.rows.{n}"), columns, n, dict(ROWS)[n], say) for n in _BARS]
    plots.append(lines(say("bench.suite.over_rounds"), columns))
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        language="zh-CN" if language == "zh" else "en",
        title=html.escape(title(columns, say)),
        table=_table(columns, say),
        plots="".join(plots),
        notes="".join(f"<p>{html.escape(line)}</p>" for line in notes(columns, say) if line),
    )


def _table(columns: list[Column], say: Say) -> str:
    head = "".join(f'<th scope="col">{html.escape(column.name)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(say(f"bench.suite.rows.{name}"))}</th>'
        + "".join(f"<td>{html.escape(shown(column, name, unit, say))}</td>" for column in columns)
        + "</tr>"
        for name, unit in ROWS
    )
    return f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>"


def bars(caption: str, columns: list[Column], name: str, unit: str, say: Say) -> str:
    """A bar for each column that has the figure; nothing where none has."""
    found = [(column, value) for column in columns if (value := column.figures[name]) is not None]
    longest = max((value for _, value in found), default=0) or 1
    drawn = ""
    for place, (column, value) in enumerate(found):
        y, width = place * _BAR, max(1.0, value / longest * (_WIDTH - _NAME - 90))
        words = html.escape(shown(column, name, unit, say))
        drawn += (
            f'<text x="0" y="{y + 17}">{html.escape(column.name)}</text>'
            f'<rect class="s{place}" x="{_NAME}" y="{y + 4}" width="{width:.1f}" height="{_BAR - 8}" rx="3"/>'
            f'<text x="{_NAME + width + 8:.1f}" y="{y + 17}">{words}</text>'
        )
    return _figure(caption, drawn, len(found) * _BAR) if found else ""


def lines(caption: str, columns: list[Column]) -> str:
    """The process's own memory after each round, in GB, a line for each column."""
    found = [(column, [v / 1e9 for v in column.values.get("round_private", [])]) for column in columns]
    found = [(column, values) for column, values in found if len(values) > 1]
    highest = max((max(values) for _, values in found), default=0) or 1
    drawn = f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>'
    for place, (column, values) in enumerate(found):
        y = _HEIGHT - values[-1] / highest * (_HEIGHT - 20)
        label = f"{column.name} {values[-1]:.2f} GB"
        drawn += f'<polyline class="s{place}" points="{_points(values, highest)}"/>'
        drawn += f'<text class="end" x="{_WIDTH}" y="{y - 6:.1f}">{html.escape(label)}</text>'
    return _figure(caption, drawn, _HEIGHT + 2) if found else ""


def _points(values: Sequence[float], highest: float) -> str:
    step = _WIDTH / (len(values) - 1)
    return " ".join(
        f"{place * step:.1f},{_HEIGHT - value / highest * (_HEIGHT - 20):.1f}"
        for place, value in enumerate(values)
    )


def _figure(caption: str, drawn: str, height: int) -> str:
    said = html.escape(caption)
    return (
        f'<figure><figcaption>{said}</figcaption><svg role="img" aria-label="{said}" '
        f'viewBox="0 0 {_WIDTH} {height}">{drawn}</svg></figure>'
    )
