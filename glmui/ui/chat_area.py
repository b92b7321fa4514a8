"""The middle: the thread, the line under it, and the box to write in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from glmui.i18n import Words

LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "$", "right": "$", "display": False},
    {"left": "\\(", "right": "\\)", "display": False},
]


_LEAF = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-step]");
  if (button) trigger("select", { step: Number(button.dataset.step) });
});
"""


@dataclass(frozen=True, slots=True)
class ChatArea:
    chip: gr.HTML
    banner: gr.Markdown
    earlier: gr.Button
    thread: gr.Chatbot
    status: gr.HTML
    versions: gr.HTML
    resume: gr.Button
    regenerate: gr.Button
    room: gr.HTML
    offers: gr.HTML
    box: gr.Textbox


def build(words: Words, assets: Path) -> ChatArea:
    chip = gr.HTML(elem_id="engine")
    banner = gr.Markdown(visible=False, elem_id="banner")
    earlier = gr.Button(words("chat.earlier"), visible=False, size="sm", elem_id="earlier")
    thread = gr.Chatbot(
        elem_id="thread",
        label=words("chat.thread"),
        show_label=False,
        container=False,
        height="100%",
        latex_delimiters=LATEX,
        layout="bubble",
        buttons=["copy"],
        placeholder=f"<h2>{words('chat.hello')}</h2><p>{words('chat.hello_more')}</p>",
        allow_tags=False,
        autoscroll=False,  # assets/glmui.js does it, and lets the reader scroll up
        sanitize_html=True,
        feedback_options=None,
        group_consecutive_messages=False,
    )
    with gr.Row(elem_id="below"):
        status = gr.HTML(elem_id="status")
        versions = gr.HTML(elem_id="versions", js_on_load=_LEAF)
        resume = gr.Button(words("chat.continue"), visible=False, size="sm", elem_id="resume", min_width=0)
        regenerate = gr.Button(
            words("chat.regenerate"), visible=False, size="sm", elem_id="regenerate", min_width=0
        )
        room = gr.HTML(elem_id="room")
    offers = gr.HTML(
        elem_id="offers",
        js_on_load=(assets / "offers.js").read_text(encoding="utf-8"),
        apply_default_css=False,
    )
    box = gr.Textbox(
        elem_id="box",
        label=words("chat.box"),
        placeholder=words("chat.placeholder"),
        show_label=False,
        container=False,
        lines=1,
        max_lines=10,
        autofocus=True,
        submit_btn=True,
        stop_btn=False,
    )
    return ChatArea(chip, banner, earlier, thread, status, versions, resume, regenerate, room, offers, box)
