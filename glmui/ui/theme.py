"""Theme: one accent colour, quiet greys, system fonts that know Chinese."""

from __future__ import annotations

import gradio as gr

FONTS = (
    "system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei UI",
    "Noto Sans SC", "Noto Sans CJK SC", "sans-serif",
)  # fmt: skip
MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "Noto Sans Mono CJK SC", "monospace")


def theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.stone,
        font=list(FONTS),
        font_mono=list(MONO),
        radius_size=gr.themes.sizes.radius_lg,
    ).set(
        body_background_fill="#fbfaf8",
        body_background_fill_dark="#191817",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#211f1e",
        background_fill_secondary="#f5f3ef",
        background_fill_secondary_dark="#191817",
        body_text_color="#23211f",
        body_text_color_dark="#ece9e4",
        body_text_color_subdued="#6b6660",
        body_text_color_subdued_dark="#a8a29a",
        border_color_primary="#e5e1da",
        border_color_primary_dark="#35322f",
        color_accent="#0f6b63",
        color_accent_soft="#e3f0ee",
        color_accent_soft_dark="#17302d",
        button_primary_background_fill="#0f6b63",
        button_primary_background_fill_hover="#0b554f",
        button_primary_background_fill_dark="#0f6b63",
        button_primary_background_fill_hover_dark="#128074",
        button_primary_text_color="#ffffff",
        slider_color="#0f6b63",
        slider_color_dark="#4db6a9",
        block_shadow="none",
        block_border_width="0px",
        block_label_text_color="#3d3936",
        block_info_text_color="#6b6660",
        block_info_text_color_dark="#a8a29a",
        input_background_fill="#ffffff",
        input_background_fill_dark="#211f1e",
        input_border_color="#dcd7cf",
        input_border_color_dark="#3b3835",
        input_border_color_focus="#0f6b63",
        input_border_color_focus_dark="#4db6a9",
        link_text_color="#0b554f",
        link_text_color_dark="#6cc7bb",
    )
