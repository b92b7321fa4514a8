"""What a first start shows instead of a thread: three ways to a model."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from glmui.ui.words import Words


@dataclass(frozen=True, slots=True)
class WelcomeArea:
    panel: gr.Column
    get_starter: gr.Button
    cancel: gr.Button
    progress: gr.HTML
    folder: gr.Textbox
    use_folder: gr.Button


def build(words: Words) -> WelcomeArea:
    with gr.Column(visible=False, elem_id="welcome") as panel:
        gr.HTML(f"<h2>{words('welcome.title')}</h2><p>{words('welcome.lead')}</p>")
        with gr.Group(elem_classes="way"):
            gr.HTML(f"<h3>{words('welcome.starter')}</h3><p>{words('welcome.starter_more')}</p>")
            get_starter = gr.Button(words("welcome.get_starter"), variant="primary", elem_id="get-starter")
            progress = gr.HTML(elem_id="fetching")
            cancel = gr.Button(words("welcome.cancel"), size="sm", visible=False, elem_id="cancel-fetch")
        with gr.Group(elem_classes="way"):
            gr.HTML(f"<h3>{words('welcome.folder')}</h3><p>{words('welcome.folder_more')}</p>")
            folder = gr.Textbox(
                show_label=False,
                label=words("welcome.folder"),
                placeholder=words("welcome.folder_placeholder"),
                max_lines=1,
                elem_id="welcome-folder",
            )
            use_folder = gr.Button(words("settings.use_folder"), elem_id="welcome-use-folder")
        with gr.Group(elem_classes="way"):
            gr.HTML(f"<h3>{words('welcome.chatglm')}</h3><p>{words('welcome.chatglm_more')}</p>")
    return WelcomeArea(panel, get_starter, cancel, progress, folder, use_folder)
