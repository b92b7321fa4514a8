"""The right side: which model on what, how it answers, what it is shown, and the page's own looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from glmui.i18n import Words
from glmui.types import BOUNDS, ChatSettings, GenerationParams
from glmui.ui import memory_area

# slider: (name, lowest, highest, step); the page's reach may be narrower than BOUNDS
SLIDERS = (
    ("max_length", 256, 32768, 64),
    ("temperature", *BOUNDS["temperature"], 0.05),
    ("top_p", 0.05, BOUNDS["top_p"][1], 0.05),
    ("top_k", 0, 200, 1),
    ("repetition_penalty", *BOUNDS["repetition_penalty"], 0.05),
)
ROUNDS, TOKENS = (0, 50), (64, 8192)  # (lowest, highest) of what the model is shown
PARAMS = tuple(name for name, *_ in SLIDERS)
NAMES = (*PARAMS, "history", "history_rounds", "history_tokens", "system")


@dataclass(frozen=True, slots=True)
class ModelArea:
    choice: gr.Dropdown
    folder: gr.Textbox
    use_folder: gr.Button
    chatglm: gr.Dropdown
    device: gr.Dropdown
    layers: memory_area.LayersArea
    unload: gr.Button
    freed: gr.HTML


@dataclass(frozen=True, slots=True)
class ExtrasArea:
    prefix: gr.Textbox
    adapter: gr.Textbox


@dataclass(frozen=True, slots=True)
class HistoryArea:
    mode: gr.Radio
    rounds: gr.Slider
    tokens: gr.Slider
    system: gr.Textbox
    reset: gr.Button


@dataclass(frozen=True, slots=True)
class SettingsArea:
    model: ModelArea
    memory: memory_area.MemoryArea
    extras: ExtrasArea
    sliders: tuple[gr.Slider, ...]
    history: HistoryArea

    @property
    def of_conversation(self) -> list[gr.Component]:
        """What each conversation keeps for itself, in the order `gather` and `spread` speak of it."""
        shown = self.history
        return [*self.sliders, shown.mode, shown.rounds, shown.tokens, shown.system]


def gather(values: Sequence[Any]) -> ChatSettings:
    """The components' values as settings. A number half typed or left out is brought within its bounds."""
    named = dict(zip(NAMES, values, strict=True))
    default = ChatSettings()
    for name, low, high, step in SLIDERS:
        number = _within(named[name], low, high, getattr(default.params, name))
        named[name] = int(number) if isinstance(step, int) else float(number)
    return ChatSettings(
        params=GenerationParams(**{name: named[name] for name in PARAMS}),
        system=named["system"] or "",
        history=named["history"] or default.history,
        history_rounds=int(_within(named["history_rounds"], *ROUNDS, default.history_rounds)),
        history_tokens=int(_within(named["history_tokens"], *TOKENS, default.history_tokens)),
    )


def _within(value: Any, low: float, high: float, default: float) -> float:
    return min(max(value if isinstance(value, int | float) else default, low), high)


def spread(settings: ChatSettings) -> list[object]:
    """Settings as the components' values."""
    return [getattr(settings.params if name in PARAMS else settings, name) for name in NAMES]


def build(words: Words, devices: Sequence[tuple[str, str]], cores: int) -> SettingsArea:
    has_card = any(name == "mixed" for _, name in devices)
    area = SettingsArea(
        model=_model(words, devices, has_card),
        memory=memory_area.build_memory(words, has_card, cores),
        extras=_extras(words),
        sliders=_sliders(words),
        history=_history(words),
    )
    _looks(words)
    return area


def _model(words: Words, devices: Sequence[tuple[str, str]], has_card: bool) -> ModelArea:
    with gr.Accordion(words("settings.model_section"), open=True):
        choice = gr.Dropdown(
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
        folder, use_folder = _folder(words)
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
        return ModelArea(
            choice=choice,
            folder=folder,
            use_folder=use_folder,
            chatglm=chatglm,
            device=device,
            layers=memory_area.build_layers(words),
            unload=gr.Button(
                words("settings.unload_card" if has_card else "settings.unload"), size="sm", elem_id="unload"
            ),
            freed=gr.HTML('<div role="status"></div>', elem_id="freed"),
        )


def _folder(words: Words) -> tuple[gr.Textbox, gr.Button]:
    """A model that lies somewhere else: its folder, and the button that takes it."""
    with gr.Accordion(words("settings.folder"), open=False, elem_id="other"):
        folder = gr.Textbox(
            label=words("settings.folder"),
            show_label=False,
            info=words("settings.folder_info"),
            max_lines=1,
            elem_id="folder",
        )
        return folder, gr.Button(words("settings.use_folder"), size="sm", elem_id="use-folder")


def _extras(words: Words) -> ExtrasArea:
    def box(name: str) -> gr.Textbox:
        label, info = words(f"settings.{name}"), words(f"settings.{name}_info")
        return gr.Textbox(label=label, info=info, max_lines=1, elem_id=name)

    with gr.Accordion(words("settings.extras_section"), open=False):
        return ExtrasArea(prefix=box("prefix"), adapter=box("adapter"))


def _sliders(words: Words) -> tuple[gr.Slider, ...]:
    default = GenerationParams()
    with gr.Accordion(words("settings.reply_section"), open=True):
        return tuple(
            gr.Slider(
                low,
                high,
                value=getattr(default, name),
                step=step,
                label=words(f"settings.{name}"),
                info=words(f"settings.{name}_info"),
                buttons=[],
                elem_id=name.replace("_", "-"),
            )
            for name, low, high, step in SLIDERS
        )


def _history(words: Words) -> HistoryArea:
    default = ChatSettings()

    def bound(name: str, bounds: tuple[int, int], value: int, step: int) -> gr.Slider:
        label, info = words(f"settings.{name}"), words(f"settings.{name}_info")
        return gr.Slider(*bounds, value=value, step=step, label=label, info=info, buttons=[], visible=False)

    with gr.Accordion(words("settings.history_section"), open=True):
        return HistoryArea(
            mode=gr.Radio(
                [(words(f"settings.history_{mode}"), mode) for mode in ("fit", "rounds", "tokens")],
                value=default.history,
                label=words("settings.history"),
                info=words("settings.history_info"),
            ),
            rounds=bound("rounds", ROUNDS, default.history_rounds, 1),
            tokens=bound("tokens", TOKENS, default.history_tokens, 64),
            system=gr.Textbox(
                label=words("settings.system"),
                info=words("settings.system_info"),
                lines=2,
                max_lines=8,
                max_length=20_000,
            ),
            reset=gr.Button(words("settings.reset"), size="sm", elem_id="reset"),
        )


def _looks(words: Words) -> None:
    themes = "|".join(words(f"looks.{theme}") for theme in ("system", "light", "dark"))
    other = "en" if words.language == "zh" else "zh"
    gr.HTML(
        f'<button type="button" data-glmui="language:{other}">{words("looks.language")}</button>'
        f'<button type="button" data-glmui="theme" data-themes="{themes}">{words("looks.system")}</button>',
        elem_id="looks",
    )
