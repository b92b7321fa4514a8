"""What happens at the memory's controls: the slider's prediction, the plan's table, the card set free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import gradio as gr

from glmui.errors import GlmuiError
from glmui.i18n import Words
from glmui.memory.forecast import Forecast
from glmui.ui import present_plan
from glmui.ui.memory import Memory

Updates = Any  # one value, or a tuple with one for each output

CONTROLS = 8  # what `controls` updates


class MemoryEvents:
    def __init__(self, memory: Memory, words: Words) -> None:
        self._memory = memory
        self._words = words

    def controls(self) -> tuple[Updates, ...]:
        """The controls as the settings have them; those that say nothing of this model are hidden."""
        chosen = self._memory.settings
        found = self._found()
        known, mixed = found is not None, chosen.device == "mixed"
        return (
            gr.update(value=chosen.layers_on_gpu is None, visible=known and mixed),
            self._slider(found),
            gr.update(visible=known),
            gr.update(visible=known),
            chosen.context,
            chosen.kv_cache,
            chosen.head_bits,
            chosen.vram_reserve_gb,
        )

    def slider(self) -> Updates:
        """At the layers that were chosen, else at those that fit; shown where they can be chosen."""
        return self._slider(self._found())

    def _slider(self, found: Forecast | None) -> Updates:
        chosen = self._memory.settings
        if found is None or chosen.device != "mixed":
            return gr.update(visible=False)
        fits, most = found.plan.layers_on_card, found.size.layers
        value = fits if chosen.layers_on_gpu is None else min(chosen.layers_on_gpu, most)
        return gr.update(visible=True, maximum=most, value=value)

    def _found(self) -> Forecast | None:
        with suppress(GlmuiError):  # the line tells of it
            prospect = self._memory.prospect(self._memory.settings.layers_on_gpu)
            return prospect.found if prospect else None
        return None

    def plan(self, fit: bool, layers: float | None, *shown: str) -> tuple[Updates, ...]:
        """The line and the table for the slider as it stands, where they are news to the page."""
        if self._memory.freeing:
            return (gr.skip(),) * len(shown)
        told = self._told(None if fit else present_plan.whole(layers))
        return tuple(gr.skip() if new == old else new for new, old in zip(told, shown, strict=True))

    def predict(self, layers: float | None) -> Updates:
        """While the slider moves: what so many layers on the card would take. Nothing is kept yet."""
        return False, *self._told(present_plan.whole(layers), spoken=True)

    def free(self) -> Iterator[Updates]:
        """Give the model's memory back, and tell of it with the numbers before and after."""
        yield present_plan.spoken([self._words("settings.freeing")])
        freed = self._memory.free()
        yield present_plan.spoken(present_plan.freed(freed, self._words))

    def _told(self, layers: int | None, spoken: bool = False) -> tuple[str, str]:
        """The line and the table; nothing for a model that no plan knows."""
        try:
            prospect = self._memory.prospect(layers)
        except GlmuiError as error:
            return present_plan.trouble(error.message(self._words.language)), ""
        if prospect is None:
            return "", ""
        return present_plan.line(prospect, self._words, spoken), present_plan.table(prospect, self._words)
