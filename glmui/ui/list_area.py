"""The left side: new conversation, search, the list, undo, and the meter at its foot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from glmui.i18n import Words


@dataclass(frozen=True, slots=True)
class ListArea:
    new: gr.Button
    search: gr.Textbox
    rows: gr.HTML
    undo: gr.Button
    deleted: gr.Textbox  # hidden: the id that undo brings back
    meter: gr.HTML


def build(words: Words, assets: Path) -> ListArea:
    gr.HTML(f'<h1 class="brand"><img src="{icon(assets)}" alt="">glmui</h1>', elem_id="brand")
    new = gr.Button(words("list.new"), elem_id="new", size="md")
    search = gr.Textbox(
        placeholder=words("list.search"),
        show_label=False,
        label=words("list.search"),
        container=False,
        elem_id="search",
        max_length=200,
    )
    undo = gr.Button(words("list.undo"), elem_id="undo", size="sm", visible=False)
    rows = gr.HTML(
        js_on_load=(assets / "conversations.js").read_text(encoding="utf-8"),
        elem_id="conversations",
    )
    deleted = gr.Textbox(visible="hidden", elem_id="deleted")
    gr.HTML(
        f'<button type="button" data-glmui="view:models">{words("shelf.open")}</button>'
        f'<button type="button" data-glmui="view:doctor">{words("doctor.title")}</button>',
        elem_id="places",
        apply_default_css=False,
    )
    meter = gr.HTML(elem_id="meter")
    return ListArea(new, search, rows, undo, deleted, meter)


def icon(assets: Path) -> str:
    """The icon as a data URI: one file less to fetch."""
    from base64 import b64encode

    return "data:image/svg+xml;base64," + b64encode((assets / "icon.svg").read_bytes()).decode()
