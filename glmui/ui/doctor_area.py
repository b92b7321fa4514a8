"""The Doctor area: one button that looks at everything, what was found, and the report to hand on."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass

import gradio as gr

from glmui.i18n import Words

# Copies the report; its result is the button's new label. Plain HTTP from another machine has no clipboard.
_COPY = """
async (text) => {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const box = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  return COPIED;
}
"""


@dataclass(frozen=True, slots=True)
class DoctorArea:
    look: gr.Button
    copy: gr.Button
    findings: gr.HTML
    report: gr.Textbox  # hidden: the text that is copied


def build(words: Words) -> DoctorArea:
    with gr.Column(elem_id="doctor", elem_classes="view"):
        gr.HTML(
            f'<div class="shelf"><div class="head"><h2>{html.escape(words("doctor.title"))}</h2>'
            f'<button type="button" data-glmui="view:">{html.escape(words("shelf.back"))}</button></div>'
            f"<p>{html.escape(words('doctor.about'))}</p></div>"
        )
        with gr.Row(elem_id="doctor-acts"):
            look = gr.Button(words("doctor.look"), variant="primary", elem_id="doctor-look", min_width=0)
            copy = gr.Button(words("doctor.copy"), visible=False, elem_id="doctor-copy", min_width=0)
        findings = gr.HTML(elem_id="findings")
        report = gr.Textbox(visible="hidden")
    copy.click(
        None,
        report,
        copy,
        js=_COPY.replace("COPIED", json.dumps(words("doctor.copied"))),
        api_visibility="private",
        show_progress="hidden",
        queue=False,
    )
    return DoctorArea(look, copy, findings, report)
