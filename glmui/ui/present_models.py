"""The Models area and the welcome as HTML: pure functions. assets/models.js gives their buttons life."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from glmui.downloads import Task
from glmui.i18n import Words
from glmui.ui.inventory import FIRST, Look
from glmui.ui.model_cards import Cards
from glmui.ui.model_words import computer, label, stage
from glmui.ui.shelf import QUANTIZE


def models(look: Look, words: Words) -> str:
    """The Models area: this computer, what is here, what can be had, a folder of one's own."""
    cards = Cards("models", look, words)
    say = cards.say
    here = _list(cards.row(entry) for entry in look.here) or f"<p>{say('shelf.none_here')}</p>"
    offered = _list(cards.row(entry) for entry in sorted(look.offered, key=lambda entry: entry.name != FIRST))
    removed = "".join(cards.removed(gone) for gone in look.removed)
    return (
        f'<div class="shelf"><div class="head"><h2>{say("shelf.title")}</h2>'
        f'<button type="button" data-glmui="view:">{say("shelf.back")}</button></div>'
        f"<p>{escape(computer(look, words))}</p>"
        f"<h3>{say('shelf.here')}</h3>{here}{removed}{_place(cards)}"
        + (f"<h3>{say('shelf.offered')}</h3>{offered}" if offered else "")
        + f'<h3 id="own-folder">{say("shelf.own")}</h3>{_own_folder(cards)}</div>'
    )


def welcome(look: Look, words: Words) -> str:
    """The first start: ChatGLM-6B-INT4, the starter, what is here already, and the way to all the others."""
    cards = Cards("welcome", look, words)
    say = cards.say
    first, starter = look.entry(FIRST), look.entry("starter")
    best = first if first and first.fits else starter
    shown = [entry for entry in (first, starter) if entry]
    shown += [entry for entry in look.here if entry not in shown and entry.chats]
    rows = [cards.row(entry, "h3", recommended=entry is best) for entry in shown]
    own = (
        f'<li><div class="head"><h3>{say("welcome.folder")}</h3></div><p>{say("welcome.folder_more")}</p>'
        f'<div class="acts top"><button type="button" data-glmui="view:models:own-folder">'
        f"{say('welcome.choose_folder')}</button></div></li>"
    )
    return (
        f'<div class="shelf"><h2>{say("welcome.title")}</h2><p>{say("welcome.lead")}</p>'
        f"<p>{escape(computer(look, words))}</p>{_list([*rows, own])}"
        f'<div class="acts"><button type="button" data-glmui="view:models">{say("welcome.more")}</button>'
        "</div></div>"
    )


def aside(task: Task | None, paused: bool, say: Words) -> str:
    """What is being done, for the foot of the left side: it goes on while one chats."""
    if task is None:
        return ""
    fraction, words = task.progress.fraction, stage(task, paused, say)
    part = words if paused or fraction is None else f"{fraction:.0%}"
    name = escape(label(task.name, say))
    return (
        f'<div class="meter aside" title="{escape(words)}"><div class="bar calm"><span>{name}</span>'
        f'<span>{escape(part)}</span><div><i style="width:{fraction or 0:.0%}"></i></div></div></div>'
    )


def _list(rows: Iterable[str]) -> str:
    inside = "".join(rows)
    return f"<ul>{inside}</ul>" if inside else ""


def _place(cards: Cards) -> str:
    """Where the models lie, with a button that copies it."""
    folder = escape(str(cards.look.folder))
    return (
        f'<p class="place"><span>{cards.say("shelf.folder")}</span> <code>{folder}</code> '
        f'<button type="button" data-copy="yes">{cards.say("shelf.copy")}</button></p>'
    )


def _own_folder(cards: Cards) -> str:
    """The form for a folder from elsewhere, and what became of the last one."""
    task = cards.look.task if cards.look.task and cards.look.task.kind == "import" else None
    said = cards.task(task) if task else ""
    if task and task.error and task.error.code == "import_untrusted":
        return f'<div class="own"><section>{said}{_typing(cards, task.name)}</section></div>'
    return f'<div class="own"><p>{cards.say("shelf.own_more")}</p>{_form(cards)}{said}</div>'


def _form(cards: Cards) -> str:
    say = cards.say
    choices = "".join(
        f'<option value="{bits}">{say(f"settings.quantize_{bits}")}</option>' for bits in QUANTIZE
    )
    return (
        '<form data-act="import">'
        f"<label><span>{say('shelf.own_folder')}</span>"
        f"{_field('folder', say('welcome.folder_placeholder'), 'required')}</label>"
        f'<div class="pair"><label><span>{say("shelf.own_name")}</span>'
        f"{_field('name', say('shelf.own_name_hint'))}</label>"
        f"<label><span>{say('shelf.own_quantize')}</span>"
        f'<select name="quantize">{choices}</select></label></div>'
        f'<div class="acts"><button type="submit" class="primary"{cards.off}>{say("shelf.import")}</button>'
        f'<button type="submit" data-act="open">{say("shelf.in_place")}</button></div></form>'
    )


def _typing(cards: Cards, name: str) -> str:
    """Files that nobody vouches for: the user does, by typing the model's name.

    It stands in a section, since Gradio changes elements in place: the field would keep the folder's path.
    """
    return (
        f'<form data-act="trust"><label><span>{cards.say("shelf.type_name", name=name)}</span>'
        f"{_field('typed', '', 'required')}</label>"
        f'<div class="acts"><button type="submit">{cards.say("shelf.import")}</button>'
        f"{cards.button('dismiss', 'shelf.cancel')}</div></form>"
    )


def _field(name: str, hint: str, extra: str = "") -> str:
    plain = 'autocomplete="off" spellcheck="false" maxlength="4000"'
    return f'<input name="{name}" placeholder="{hint}" {plain} {extra}>'
