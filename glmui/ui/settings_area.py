"""The right side: which model on what, how it answers, what it is shown, and the page's own looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from glmui.types import BOUNDS, ChatSettings, GenerationParams
from glmui.ui import memory_area
from glmui.ui.words import Words

# slider: (name, lowest, highest, step); the page's reach may be narrower than BOUNDS
SLIDERS = (
    ("max_length", 256, 32768, 64),
    ("temperature", *BOUNDS["temperature"], 0.05),
    ("top_p", 0.05, BOUNDS["top_p"][1], 0.05),
    ("top_k", 0, 200, 1),
    ("repetition_penalty", *BOUNDS["repetition_penalty"], 0.05),
)
PARAMS = tuple(name for name, *_ in SLIDERS)
NAMES = (*PARAMS, "history", "history_rounds", "history_tokens", "system")


@dataclass(frozen=True, slots=True)
class SettingsArea:
    model: gr.Dropdown
    folder: gr.Textbox
    use_folder: gr.Button
    chatglm: gr.Dropdown
    prefix: gr.Textbox
    adapter: gr.Textbox
    device: gr.Dropdown
    layers: memory_area.LayersArea
    unload: gr.Button
    freed: gr.HTML
    memory: memory_area.MemoryArea
    sliders: tuple[gr.Slider, ...]
    history: gr.Radio
    rounds: gr.Slider
    tokens: gr.Slider
    system: gr.Textbox
    reset: gr.Button

    @property
    def of_conversation(self) -> list[gr.Component]:
        """What each conversation keeps for itself, in the order `gather` and `spread` speak of it."""
        return [*self.sliders, self.history, self.rounds, self.tokens, self.system]


def gather(values: Sequence[Any]) -> ChatSettings:
    """The components' values as settings. A number half typed or left out is brought within its bounds."""
    named = dict(zip(NAMES, values, strict=True))
    default = ChatSettings()
    for name, low, high, step in SLIDERS:
        number = named[name] if isinstance(named[name], int | float) else getattr(default.params, name)
        number = min(max(number, low), high)
        named[name] = int(number) if isinstance(step, int) else float(number)
    return ChatSettings(
        params=GenerationParams(**{name: named[name] for name in PARAMS}),
        system=named["system"] or "",
        history=named["history"] or default.history,
        history_rounds=int(named["history_rounds"] or 0),
        history_tokens=int(named["history_tokens"] or default.history_tokens),
    )


def spread(settings: ChatSettings) -> list[object]:
    """Settings as the components' values."""
    return [getattr(settings.params if name in PARAMS else settings, name) for name in NAMES]


def build(words: Words, devices: Sequence[tuple[str, str]], cores: int) -> SettingsArea:
    default = ChatSettings()
    with gr.Accordion(words("settings.model_section"), open=True):
        model = gr.Dropdown(
            label=words("settings.model"),
            info=words("settings.model_info"),
            choices=[],
            allow_custom_value=True,
        )
        gr.HTML(
            f'<button type="button" data-glmui="view:models">{words("shelf.manage")}</button>',
            elem_id="manage",
            apply_default_css=False,
        )
        with gr.Accordion(words("settings.folder"), open=False, elem_id="other"):
            folder = gr.Textbox(
                label=words("settings.folder"),
                show_label=False,
                info=words("settings.folder_info"),
                max_lines=1,
                elem_id="folder",
            )
            use_folder = gr.Button(words("settings.use_folder"), size="sm", elem_id="use-folder")
        chatglm = gr.Dropdown(
            label=words("settings.chatglm_family"),
            info=words("settings.chatglm_family_info"),
            choices=[("ChatGLM2-6B", "chatglm2"), ("ChatGLM3-6B", "chatglm3")],
            visible=False,
            elem_id="chatglm-family",
        )
        device = gr.Dropdown(
            label=words("settings.device"),
            info=words("settings.device_info"),
            choices=list(devices),
            elem_id="device",
        )
        layers = memory_area.build_layers(words)
        has_card = any(name == "mixed" for _, name in devices)
        unload = gr.Button(
            words("settings.unload_card" if has_card else "settings.unload"), size="sm", elem_id="unload"
        )
        freed = gr.HTML('<div role="status"></div>', elem_id="freed")
    memory = memory_area.build_memory(words, has_card, cores)
    with gr.Accordion(words("settings.extras_section"), open=False):
        prefix, adapter = (
            gr.Textbox(
                label=words(f"settings.{name}"),
                info=words(f"settings.{name}_info"),
                max_lines=1,
                elem_id=name,
            )
            for name in ("prefix", "adapter")
        )
    with gr.Accordion(words("settings.reply_section"), open=True):
        sliders = tuple(
            gr.Slider(
                low,
                high,
                value=getattr(default.params, name),
                step=step,
                label=words(f"settings.{name}"),
                info=words(f"settings.{name}_info"),
                buttons=[],
                elem_id=name.replace("_", "-"),
            )
            for name, low, high, step in SLIDERS
        )
    with gr.Accordion(words("settings.history_section"), open=True):
        history = gr.Radio(
            [(words(f"settings.history_{mode}"), mode) for mode in ("fit", "rounds", "tokens")],
            value=default.history,
            label=words("settings.history"),
            info=words("settings.history_info"),
        )
        rounds = gr.Slider(
            0,
            50,
            value=default.history_rounds,
            step=1,
            label=words("settings.rounds"),
            info=words("settings.rounds_info"),
            buttons=[],
            visible=False,
        )
        tokens = gr.Slider(
            64,
            8192,
            value=default.history_tokens,
            step=64,
            label=words("settings.tokens"),
            info=words("settings.tokens_info"),
            buttons=[],
            visible=False,
        )
        system = gr.Textbox(
            label=words("settings.system"),
            info=words("settings.system_info"),
            lines=2,
            max_lines=8,
            max_length=20_000,
        )
        reset = gr.Button(words("settings.reset"), size="sm", elem_id="reset")
    themes = "|".join(words(f"looks.{theme}") for theme in ("system", "light", "dark"))
    other = "en" if words.language == "zh" else "zh"
    gr.HTML(
        f'<button type="button" data-glmui="language:{other}">{words("looks.language")}</button>'
        f'<button type="button" data-glmui="theme" data-themes="{themes}">{words("looks.system")}</button>',
        elem_id="looks",
    )
    return SettingsArea(
        model, folder, use_folder, chatglm, prefix, adapter, device, layers, unload, freed,
        memory, sliders, history, rounds, tokens, system, reset,
    )  # fmt: skip
