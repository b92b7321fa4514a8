"""What a first start shows instead of a thread: the ways to a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from glmui.i18n import Words
from glmui.ui.models_area import script


@dataclass(frozen=True, slots=True)
class WelcomeArea:
    panel: gr.Column
    ways: gr.HTML


def build(words: Words, assets: Path) -> WelcomeArea:
    with gr.Column(visible=False, elem_id="welcome") as panel:
        ways = gr.HTML(
            f"<h2>{words('welcome.title')}</h2>",
            js_on_load=script(assets),
            elem_id="ways",
            apply_default_css=False,
        )
    return WelcomeArea(panel, ways)
