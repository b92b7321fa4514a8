"""What happens at each event of the page: the desk acts, present.py words it, here it becomes updates.

Every function returns updates for the components its event was wired to in page.py, in that order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from hashlib import md5
from typing import Any

import gradio as gr

from glmui.doctor.report import report
from glmui.errors import GlmuiError
from glmui.i18n import Words
from glmui.meter import Reading
from glmui.types import ChatSettings
from glmui.ui import present, present_doctor, present_models, present_outlook, present_plan, settings_area
from glmui.ui.asking_events import AskingEvents, as_notice
from glmui.ui.desk import PAGE_OF_MESSAGES, Desk, View
from glmui.ui.memory_events import CONTROLS, MemoryEvents

Updates = Any  # one value, or a tuple with one for each output

ENGINE_SETTINGS = 8 + CONTROLS  # what _engine_settings updates


class Events:
    def __init__(self, desk: Desk, words: Words) -> None:
        self.desk = desk
        self.words = words
        self.language = words.language
        self.asking = AskingEvents(desk, words)
        self.memory = MemoryEvents(desk.memory, words)

    # Conversations. "Here" is: current, how many messages are shown, the conversation's settings.

    def _here(self, conversation_id: str) -> tuple[Updates, ...]:
        settings = self.desk.service.settings_of(conversation_id) if conversation_id else ChatSettings()
        return (conversation_id, PAGE_OF_MESSAGES, *settings_area.spread(settings))

    @as_notice
    def opened(self, wished: str, tab: str, width: int) -> Updates:
        return (
            *self._here(self.desk.open_conversation(wished)),
            tab,
            gr.Sidebar(open=width > 900),
            gr.Sidebar(open=width > 1200),
        )

    def _engine_settings(self) -> tuple[Updates, ...]:
        chosen = self.desk.choice.settings
        model = gr.update(choices=self.desk.models(self.language), value=chosen.model or None)
        device = gr.update(choices=self.desk.devices(self.language), value=chosen.device)
        chatglm = gr.update(value=chosen.chatglm_family or None, visible=self.desk.choice.in_doubt())
        return (
            model, chatglm, device, chosen.prefix, chosen.adapter,
            chosen.quantize, chosen.threads, chosen.idle_minutes, *self.memory.controls(),
        )  # fmt: skip

    @as_notice
    def new(self) -> Updates:
        return self._here("")

    @as_notice
    def select(self, event: gr.EventData) -> Updates:
        return self._here(event.id)

    @as_notice
    def rename(self, event: gr.EventData) -> None:
        self.desk.service.rename(event.id, event.title)

    @as_notice
    def delete(self, current: str, deleted: str, event: gr.EventData) -> Updates:
        self.desk.service.delete(event.id)
        here = self._here("") if event.id == current else (gr.skip(),) * (2 + len(settings_area.NAMES))
        return f"{event.id} {deleted}", gr.update(visible=True), *here

    @as_notice
    def undo(self, deleted: str) -> Updates:
        """Bring back what was deleted last; `deleted` holds the ids, newest first."""
        newest, _, others = deleted.partition(" ")
        self.desk.service.restore(newest)
        return others, gr.update(visible=bool(others)), *self._here(newest)

    # Following

    async def follow(self, tab: str, current: str, shown: int) -> AsyncIterator[Updates]:
        """Views of the conversation as updates of the thread and of what stands below it."""
        before: tuple[Updates, ...] = ()
        try:
            async for view in self.desk.follow(tab, current, shown):
                after = (*await asyncio.to_thread(self._view, view), view.stamp)
                if not self.desk.is_followed_by(tab, view.follower):
                    return
                news = [
                    gr.skip() if i < len(before) and before[i] == new else new for i, new in enumerate(after)
                ]
                # The stamp goes with every view: one that a browser takes up after another conversation's
                # is known by it, and put right at the next tick.
                yield *news[:-1], view.stamp
                before = after
        except GlmuiError as error:
            raise gr.Error(error.message(self.language), print_exception=False) from None

    def _view(self, view: View) -> tuple[Updates, ...]:
        last = view.last_reply
        return (
            present.thread(view.messages, view.live, self.words, view.seen),
            present.status(view.live, view.place, last, self.words),
            gr.update(submit_btn=not view.live, stop_btn=bool(view.live)),
            gr.update(visible=view.more),
            present.versions(None if view.live else last, self.words),
            gr.update(visible=view.can_continue),
            gr.update(visible=bool(view.messages) and not view.live),
            gr.skip() if view.live else present_outlook.room(view.left, self.words),
        )

    def _room(self, current: str) -> Updates:
        if self.desk.service.live(current):
            return gr.skip()  # it is told anew when the reply has ended
        return present_outlook.room(self.desk.room_left(current), self.words)

    # Settings

    @as_notice
    def keep_settings(self, current: str, *values: Any) -> None:
        if current:
            self.desk.service.set_settings(current, settings_area.gather(values))

    @as_notice
    def reset(self, current: str) -> Updates:
        if current:
            self.desk.service.set_settings(current, ChatSettings())
        return settings_area.spread(ChatSettings())

    def choose(self, name: str) -> Callable[[Any], None]:
        """The handler of one control: it changes one setting and leaves the others as they are."""

        @as_notice
        def change(self: Events, value: Any) -> None:
            self.desk.choose(**{name: value})

        return lambda value: change(self, value)

    def kept(self, name: str) -> Callable[[], Any]:
        """The handler that shows one setting as it is."""
        return lambda: getattr(self.desk.choice.settings, name)

    @as_notice
    def keep_layers(self, layers: float | None, fit: bool = False) -> Updates:
        """So many layers on the card as the slider says, or as fit, which it then shows."""
        self.desk.choose(layers_on_gpu=None if fit else present_plan.whole(layers))
        return self.memory.slider()

    @as_notice
    def use_folder(self, folder: str) -> Updates:
        self.desk.choose(model=folder.strip().strip('"'))
        chosen = self.desk.choice.settings.model
        return "", gr.update(choices=self.desk.models(self.language), value=chosen)

    # Models

    @as_notice
    def act(self, event: gr.EventData) -> None:
        self.desk.shelf.act(event.act, event.name, event.values)

    @as_notice
    def act_and_choose(self, event: gr.EventData) -> None:
        """The welcome's buttons: the model that comes is to be used."""
        self.desk.shelf.act(event.act, event.name, event.values, choose=True)

    # The doctor

    def examine(self) -> Iterator[Updates]:
        """The look button, the copy button, what was found, and the report."""
        busy = present.line("busy", self.words("doctor.looking"), spoken=True)
        yield gr.update(interactive=False), gr.update(visible=False), busy, ""
        found = self.desk.examine()
        yield (
            gr.update(interactive=True),
            gr.update(visible=True, value=self.words("doctor.copy")),
            present_doctor.findings(found, self.language),
            report(found, self.language),
        )

    # The pulse of the page

    def tick(
        self,
        tab: str,
        current: str,
        showing: str,
        seen: str,
        pulse: int,
        query: str,
        shelf: str,
        fit: bool,
        layers: float | None,
        *told: str,
    ) -> Updates:
        service, chosen = self.desk.service, self.desk.choice.settings
        info = service.engine.info()
        reading = self.desk.meter.read(info.pid)
        news = self._news(current, seen, query)
        if news:  # the slider is about to stand elsewhere
            fit, layers = chosen.layers_on_gpu is None, chosen.layers_on_gpu
        return (
            present.meter(reading, self.words) + self._aside(),
            present.engine(info, chosen.model, service.running(), self.words, chosen.idle_minutes),
            self._room(current),
            pulse + 1 if self.desk.needs_follower(tab, current, showing) else gr.skip(),
            *(news or (gr.skip(),) * (5 + ENGINE_SETTINGS)),
            *self._shelf(shelf, reading),
            *self.memory.plan(fit, layers, *told),
        )

    def _news(self, current: str, seen: str, query: str) -> tuple[Updates, ...]:
        """The list and the settings, nothing where they have not changed; a database that refuses, in the
        banner."""
        service, chosen = self.desk.service, self.desk.choice.settings
        models = self.desk.shelf.names()
        news = f"{service.changes}|{current}|{query}|{chosen!r}|{models}|{time.strftime('%j')}"
        if news == seen:
            return ()
        try:
            rows = present.conversations(service.store.conversations(query), current, query, self.words)
        except GlmuiError as error:
            rows, news, trouble = gr.skip(), gr.skip(), error.message(self.language)
        else:
            trouble = self._model_trouble()
        notice = trouble or (service.store.notice.message(self.language) if service.store.notice else "")
        return (
            rows,
            news,
            gr.update(value=notice, visible=bool(notice)),
            gr.update(visible=bool(chosen.model)),
            gr.update(visible=not chosen.model),
            *self._engine_settings(),
        )

    def _model_trouble(self) -> str:
        """What is wrong with the chosen model's folder, said before anybody asks it something."""
        try:
            self.desk.choice.check()
        except GlmuiError as error:
            return error.message(self.language)
        return ""

    def _aside(self) -> str:
        downloads = self.desk.shelf.downloads
        return present_models.aside(downloads.running, downloads.paused, self.words)

    def _shelf(self, seen: str, reading: Reading) -> tuple[Updates, ...]:
        """The Models area and the welcome, where either has changed."""
        look = self.desk.shelf.look(reading)
        models = present_models.models(look, self.words)
        welcome = present_models.welcome(look, self.words)
        news = md5((models + welcome).encode(), usedforsecurity=False).hexdigest()
        return (gr.skip(),) * 3 if news == seen else (models, welcome, news)
