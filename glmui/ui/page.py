"""The page put together: areas side by side, and which event calls what. One copy for each language."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from glmui.i18n import Words
from glmui.ui import chat_area, doctor_area, list_area, models_area, settings_area, welcome_area
from glmui.ui.desk import PAGE_OF_MESSAGES, Desk
from glmui.ui.events import Events

TICK_SECONDS = 2
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUICK: dict[str, Any] = {**PRIVATE, "queue": False}  # answered at once, beside the queue
# Through the queue, which alone can show a notice.
ACT: dict[str, Any] = {**PRIVATE, "concurrency_limit": None}


def build(desk: Desk, language: str, assets: Path) -> gr.Blocks:
    """The page in one language."""
    words = Words(language)
    with gr.Blocks(title="glmui", fill_height=True, analytics_enabled=False) as blocks:
        _Wiring(desk, words, assets).wire(blocks)
    return blocks


class _Wiring:
    def __init__(self, desk: Desk, words: Words, assets: Path) -> None:
        self.do = Events(desk, words)
        self.current = gr.Textbox(visible="hidden", elem_id="current")  # the conversation shown, "" a new one
        self.showing = gr.Textbox(visible="hidden")  # the stamp of the view shown
        self.tab = gr.Textbox(visible="hidden")
        self.shown = gr.Number(PAGE_OF_MESSAGES, visible="hidden", precision=0)  # messages, at most
        self.seen = gr.Textbox(visible="hidden")  # what the list at the side was made of
        self.pulse = gr.Number(0, visible="hidden", precision=0)  # moves when a follower is needed
        with gr.Sidebar(position="left", width=280, open=False, elem_id="left") as self.left:
            self.list = list_area.build(words, assets)
        with gr.Sidebar(position="right", width=320, open=False, elem_id="right") as self.right:
            self.settings = settings_area.build(words, desk.devices(words.language), desk.cores)
        with gr.Column(elem_id="middle"):
            self.chat = chat_area.build(words, assets)
            self.welcome = welcome_area.build(words, assets)
            self.models = models_area.build(words, assets)
            self.doctor = doctor_area.build(words)
        # What opening a conversation sets:
        self.here = [self.current, self.shown, *self.settings.of_conversation]

    def wire(self, blocks: gr.Blocks) -> None:
        self._opening(blocks)
        self._asking()
        self._conversations()
        self._conversation_settings()
        self._model()
        self._memory()
        self._shelf()
        self._examining()
        self._ticking()

    def _then_follow(self, event: Any) -> None:
        """After the event: the address names the conversation, and the thread is followed while it grows."""
        event.success(None, self.current, None, js="(id) => { window.glmui.address(id); }", **QUICK)
        event.success(**self._follow())

    def _follow(self) -> dict[str, Any]:
        chat = self.chat
        return {
            "fn": self.do.follow,
            "inputs": [self.tab, self.current, self.shown],
            "outputs": [
                chat.thread, chat.status, chat.box, chat.earlier,
                chat.versions, chat.resume, chat.regenerate, chat.room, self.showing,
            ],
            "trigger_mode": "multiple",
            **ACT,
        }  # fmt: skip

    def _opening(self, blocks: gr.Blocks) -> None:
        where = "() => [window.glmui.wished(), window.glmui.tab, window.innerWidth]"
        opened = blocks.load(
            self.do.opened,
            [self.current, self.tab, self.shown],
            [*self.here, self.tab, self.left, self.right],
            js=where,
            **ACT,
        )
        self._then_follow(opened)

    def _asking(self) -> None:
        do, chat = self.do.asking, self.chat
        asked = [self.current, chat.box, self.tab, *self.settings.of_conversation]
        answered = [self.current, chat.box, chat.offers]
        self._then_follow(chat.box.submit(do.send, asked, answered, preprocess=False, **ACT))
        taken = chat.offers.select(do.take_offer, asked, answered, preprocess=False, **ACT)
        self._then_follow(taken)
        taken.success(**self._tick())  # layers that were moved are told of at once
        self.current.change(lambda: "", None, chat.offers, **QUICK)
        chat.box.stop(do.stop, self.current, None, **ACT)
        for button, act in ((chat.regenerate, do.regenerate), (chat.resume, do.resume)):
            self._then_follow(button.click(act, [self.current, self.tab], chat.offers, **ACT))
        self._then_follow(chat.versions.select(do.show_version, self.current, None, **ACT))
        more = chat.earlier.click(lambda shown: shown + PAGE_OF_MESSAGES, self.shown, self.shown, **QUICK)
        self._then_follow(more)

    def _conversations(self) -> None:
        do, side = self.do, self.list
        self._then_follow(side.new.click(do.new, None, self.here, **QUICK))
        self._then_follow(side.rows.select(do.select, None, self.here, **ACT))
        renamed = side.rows.edit(do.rename, None, None, **ACT)
        gone = [side.deleted, side.undo, *self.here]
        deleted = side.rows.delete(do.delete, [self.current, side.deleted], gone, **ACT)
        undone = side.undo.click(do.undo, side.deleted, gone, **ACT)
        for event in (renamed, deleted, undone):
            event.success(**self._tick())  # the list shows it at once
        self._then_follow(deleted)
        self._then_follow(undone)

    def _conversation_settings(self) -> None:
        do, ours = self.do, self.settings
        shown = ours.history
        numbers = [*ours.sliders, shown.rounds, shown.tokens]
        changes = [slider.release for slider in numbers] + [slider.input for slider in numbers]
        gr.on(
            [*changes, shown.mode.input, shown.system.change],
            do.keep_settings,
            [self.current, *ours.of_conversation],
            None,
            trigger_mode="always_last",
            preprocess=False,  # a number may be half typed: `gather` brings it within bounds
            **ACT,
        )
        shown.reset.click(do.reset, self.current, ours.of_conversation, **ACT)
        shown.mode.change(
            lambda mode: (gr.update(visible=mode == "rounds"), gr.update(visible=mode == "tokens")),
            shown.mode,
            [shown.rounds, shown.tokens],
            **QUICK,
        )

    def _model(self) -> None:
        do, ours, extras = self.do, self.settings, self.settings.extras
        changes = [
            ("model", ours.model.choice, ours.model.choice.input),
            ("chatglm_family", ours.model.chatglm, ours.model.chatglm.input),
            ("quantize", ours.memory.quantize, ours.memory.quantize.input),
            ("prefix", extras.prefix, extras.prefix.blur),
            ("adapter", extras.adapter, extras.adapter.blur),
            ("prefix", extras.prefix, extras.prefix.submit),
            ("adapter", extras.adapter, extras.adapter.submit),
        ]
        for name, control, changed in changes:
            changed(do.choose(name), control, None, trigger_mode="always_last", preprocess=False, **ACT)
        self._number("threads", ours.memory.threads)
        self._number("idle_minutes", ours.memory.idle)
        folder = ours.model.folder
        asked = [ours.model.use_folder.click, folder.submit]
        gr.on(asked, do.use_folder, folder, [folder, ours.model.choice], **ACT)

    def _number(self, name: str, box: gr.Number) -> Any:
        """A setting that is a number: one that is refused gives way to the one that is kept."""
        change, kept = self.do.choose(name), self.do.kept(name)
        changed = box.blur(change, box, None, trigger_mode="always_last", preprocess=False, **ACT)
        changed.failure(kept, None, box, **QUICK)
        return changed

    def _memory(self) -> None:
        """Whatever changes what goes where is followed by a tick, which tells it at once."""
        do, model, memory = self.do, self.settings.model, self.settings.memory
        layers = model.layers
        layers.slider.input(
            do.memory.predict,
            layers.slider,
            [layers.fit, *layers.told],
            trigger_mode="always_last",
            preprocess=False,
            **QUICK,
        )
        kept = [
            layers.slider.release(
                do.keep_layers,
                layers.slider,
                layers.slider,
                trigger_mode="always_last",
                preprocess=False,
                **ACT,
            ),
            layers.fit.input(
                do.keep_layers, [layers.slider, layers.fit], layers.slider, preprocess=False, **ACT
            ),
            *(
                changed(do.choose(name), control, None, trigger_mode="always_last", preprocess=False, **ACT)
                for name, control, changed in (
                    ("kv_cache", memory.cache, memory.cache.input),
                    ("head_bits", memory.head, memory.head.input),
                    ("device", model.device, model.device.input),
                )
            ),
            self._number("context", memory.context),
            self._number("vram_reserve_gb", memory.reserve),
            model.unload.click(do.memory.free, None, model.freed, **ACT),
        ]
        for event in kept:
            event.success(**self._tick())

    def _shelf(self) -> None:
        for area, act in ((self.models.shelf, self.do.act), (self.welcome.ways, self.do.act_and_choose)):
            area.select(act, None, None, **ACT).success(**self._tick())

    def _examining(self) -> None:
        area = self.doctor
        shown = [area.look, area.copy, area.findings, area.report]
        area.look.click(self.do.examine, None, shown, **{**ACT, "concurrency_limit": 1})  # it is heavy work

    def _tick(self) -> dict[str, Any]:
        side, chat, models = self.list, self.chat, self.models
        model, memory, extras = self.settings.model, self.settings.memory, self.settings.extras
        return {
            "fn": self.do.tick,
            "inputs": [
                self.tab, self.current, self.showing, self.seen, self.pulse, side.search, models.seen,
                model.layers.fit, model.layers.slider, *model.layers.told,
            ],
            "outputs": [
                side.meter, chat.chip, chat.room, self.pulse,
                side.rows, self.seen, chat.banner, chat.thread, self.welcome.panel,
                model.choice, model.chatglm, model.device, extras.prefix, extras.adapter,
                *memory.engine, *model.layers.controls, *memory.controls,
                models.shelf, self.welcome.ways, models.seen, *model.layers.told,
            ],
            "preprocess": False,  # the slider's number may be empty for a moment
            **QUICK,
        }  # fmt: skip

    def _ticking(self) -> None:
        gr.Timer(TICK_SECONDS).tick(**self._tick(), trigger_mode="once")
        gr.on([self.list.search.change, self.current.change], **self._tick(), trigger_mode="always_last")
        self.pulse.change(**self._follow())
