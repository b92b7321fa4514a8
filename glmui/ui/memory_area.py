"""Two parts of the settings: how many layers go on the card and what comes of it; what memory is kept for."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from glmui.i18n import Words

KINDS = ("auto", "fp32", "fp16", "bf16", "int8")
MOST_LAYERS = 28  # of the slider until a model is known


@dataclass(frozen=True, slots=True)
class LayersArea:
    fit: gr.Checkbox
    slider: gr.Slider
    line: gr.HTML
    where: gr.Accordion
    table: gr.HTML

    @property
    def controls(self) -> list[gr.Component]:
        return [self.fit, self.slider, self.where]

    @property
    def told(self) -> list[gr.Component]:
        """What tells of the plan."""
        return [self.line, self.table]


@dataclass(frozen=True, slots=True)
class MemoryArea:
    planned: gr.Column
    context: gr.Number
    cache: gr.Dropdown
    head: gr.Dropdown
    reserve: gr.Number
    quantize: gr.Dropdown
    threads: gr.Number
    idle: gr.Number

    @property
    def engine(self) -> list[gr.Component]:
        """What every model has, a plan or none."""
        return [self.quantize, self.threads, self.idle]

    @property
    def controls(self) -> list[gr.Component]:
        return [self.planned, self.context, self.cache, self.head, self.reserve]


def build_layers(words: Words) -> LayersArea:
    """What stands below the device: shown for models that a plan knows."""
    fit = gr.Checkbox(
        value=True, label=words("settings.fit"), container=False, visible=False, elem_id="layers-fit"
    )
    slider = gr.Slider(
        0,
        MOST_LAYERS,
        step=1,
        label=words("settings.layers"),
        info=words("settings.layers_info"),
        buttons=[],
        visible=False,
        elem_id="layers",
    )
    line = gr.HTML(elem_id="plan")
    with gr.Accordion(words("memory.where"), open=False, visible=False, elem_id="where") as where:
        table = gr.HTML()
    return LayersArea(fit, slider, line, where, table)


def build_memory(words: Words, has_card: bool, cores: int) -> MemoryArea:
    with gr.Accordion(words("settings.memory_section"), open=False, elem_id="memory"):
        with gr.Column(visible=False) as planned:
            context = gr.Number(
                label=words("settings.context"),
                info=words("settings.context_info"),
                precision=0,
                minimum=64,
                maximum=32768,
                elem_id="context",
            )
            cache = gr.Dropdown(
                label=words("settings.kv_cache"),
                info=words("settings.kv_cache_info"),
                choices=[(words(f"settings.kv_cache_{kind}"), kind) for kind in KINDS],
                elem_id="kv-cache",
            )
            head = gr.Dropdown(
                label=words("settings.head_bits"),
                info=words("settings.head_bits_info"),
                choices=[(words(f"settings.head_bits_{bits}"), bits) for bits in (16, 8)],
                elem_id="head-bits",
            )
            reserve = gr.Number(
                label=words("settings.vram_reserve_gb"),
                info=words("settings.vram_reserve_gb_info"),
                minimum=0,
                maximum=1000,
                step=0.1,
                visible=has_card,
                elem_id="vram-reserve",
            )
        quantize = gr.Dropdown(
            label=words("settings.quantize"),
            info=words("settings.quantize_info"),
            choices=[(words(f"settings.quantize_{bits}"), bits) for bits in ("none", "int8", "int4")],
        )
        threads = gr.Number(
            label=words("settings.threads"),
            info=words("settings.threads_info", cores=cores),
            precision=0,
            minimum=1,
            maximum=1024,
        )
        idle = gr.Number(
            label=words("settings.idle"), info=words("settings.idle_info"), minimum=0, elem_id="idle"
        )
    return MemoryArea(planned, context, cache, head, reserve, quantize, threads, idle)
