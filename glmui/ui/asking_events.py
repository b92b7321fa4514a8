"""What happens where the model is asked for something: an answer, another one, that a reply goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import gradio as gr

from glmui.chat import Again
from glmui.errors import GlmuiError, InvalidInput
from glmui.i18n import Words
from glmui.outlook import Outlook
from glmui.types import USUAL, ChatSettings, Once
from glmui.ui import present_outlook, settings_area
from glmui.ui.desk import Desk

Updates = Any  # one value, or a tuple with one for each output


def as_notice(method: Callable[..., Updates]) -> Callable[..., Updates]:
    """An error for the reader becomes a notice on the page, and nothing else changes."""

    @wraps(method)
    def wrapper(self: Any, *args: Any) -> Updates:
        try:
            return method(self, *args)
        except GlmuiError as error:
            raise gr.Error(error.message(self.language), print_exception=False) from None

    return wrapper


class AskingEvents:
    """`send` and `take_offer` update conversation, box and offers; the others the offers, if anything."""

    def __init__(self, desk: Desk, words: Words) -> None:
        self.desk = desk
        self.words = words
        self.language = words.language

    @as_notice
    def send(self, current: str, text: str, tab: str, *values: Any) -> Updates:
        """The message goes out. Where memory lacks room for it, it stays in the box, with what would help."""
        settings = settings_area.gather(values)
        try:
            outlook = self.desk.outlook(current, text, settings, tab)
        except InvalidInput as error:
            if error.code != "empty_message":
                raise
            return gr.skip(), gr.update(placeholder=error.message(self.language)), ""
        if outlook:
            return gr.skip(), gr.skip(), present_outlook.offers(outlook, self.words)
        return self._sent(current, text, tab, settings)

    def _sent(self, current: str, text: str, tab: str, settings: ChatSettings, once: Once = USUAL) -> Updates:
        sent = self.desk.send(current, text, settings, tab, once)
        return sent, gr.update(value="", placeholder=self.words("chat.placeholder")), ""

    @as_notice
    def take_offer(self, event: gr.EventData, current: str, text: str, tab: str, *values: Any) -> Updates:
        """What was chosen is done where it still helps: text, settings and memory may be others by now."""
        if event.act == "cancel":
            return gr.skip(), gr.skip(), ""
        if asked := getattr(event, "wish", ""):  # a tab from before an update tells no wish
            wish: Again = "regenerate" if asked == "regenerate" else "resume"
            return gr.skip(), gr.skip(), self._again(wish, current, tab, event.act)
        settings = settings_area.gather(values)
        outlook = self.desk.outlook(current, text, settings, tab)
        if outlook is None:
            return self._sent(current, text, tab, settings)
        if not _is_offered(event.act, outlook):
            return gr.skip(), gr.skip(), present_outlook.offers(outlook, self.words)
        return self._sent(current, text, tab, settings, self.desk.take_offer(event.act, outlook))

    @as_notice
    def stop(self, current: str) -> None:
        self.desk.service.stop(current)

    @as_notice
    def regenerate(self, current: str, tab: str) -> Updates:
        return self._again("regenerate", current, tab)

    @as_notice
    def resume(self, current: str, tab: str) -> Updates:
        return self._again("resume", current, tab)

    def _again(self, wish: Again, current: str, tab: str, act: str = "") -> Updates:
        """What stands where the offers are: nothing, or what would help where memory lacks room for it.
        act: what was chosen of that."""
        once, outlook = USUAL, self.desk.outlook_again(current, wish)
        if outlook and not _is_offered(act, outlook):
            return present_outlook.offers(outlook, self.words, wish)
        if outlook:
            once = self.desk.take_offer(act, outlook)
        self.desk.again(current, wish, tab, once)
        return ""

    @as_notice
    def show_version(self, current: str, event: gr.EventData) -> None:
        self.desk.show_version(current, event.step)


def _is_offered(act: str, outlook: Outlook) -> bool:
    return act in [offered for offered, *_ in present_outlook.acts(outlook)]
