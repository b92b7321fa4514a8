"""The Models area: one piece of HTML, whose buttons and forms tell `select` what they are for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from glmui.i18n import Words


@dataclass(frozen=True, slots=True)
class ModelsArea:
    shelf: gr.HTML
    seen: gr.Textbox  # hidden: names what the page shows of the shelf


def build(words: Words, assets: Path) -> ModelsArea:
    with gr.Column(elem_id="models", elem_classes="view"):
        shelf = gr.HTML(
            f"<h2>{words('shelf.title')}</h2>",
            js_on_load=script(assets),
            elem_id="shelf",
            apply_default_css=False,
        )
    return ModelsArea(shelf, gr.Textbox(visible="hidden"))


def script(assets: Path) -> str:
    """What gives the buttons of a shelf their life."""
    return (assets / "models.js").read_text(encoding="utf-8")
