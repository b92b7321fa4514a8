"""What every area of the page works with, and the handlers that need more than one of these things."""

from __future__ import annotations

import asyncio
import platform
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glmui import i18n
from glmui.chat import Again, ChatService
from glmui.choice import Choice
from glmui.doctor.examine import examine
from glmui.doctor.finding import Finding
from glmui.doctor.world import read_settings, this_machine
from glmui.downloads import refuse_elsewhere
from glmui.engine.device import count_physical_cores
from glmui.errors import InvalidInput, NotFound
from glmui.hub import installed
from glmui.jobs import Job
from glmui.memory.visible import visible
from glmui.meter import Meter
from glmui.outlook import Outlook, RoomLeft
from glmui.store import StoredMessage
from glmui.types import USUAL, ChatSettings, Once
from glmui.ui.memory import Memory
from glmui.ui.shelf import Shelf

PAGE_OF_MESSAGES = 60  # shown at first; "earlier messages" adds as many again
UPDATE_SECONDS = 0.1
CALM_CHARACTERS = 6000  # from this length on a page is updated less often, in proportion
FOLLOWER_GONE_SECONDS = 1.5
MOST_TABS = 1000


@dataclass(slots=True, eq=False)
class _Follower:
    """Follows a conversation for one tab. beat: when it last looked."""

    beat: float = 0.0


@dataclass(frozen=True, slots=True)
class View:
    """One look at a conversation: what is saved of it, and the reply being written."""

    messages: tuple[StoredMessage, ...] = ()
    more: bool = False  # there are earlier messages, not shown
    live: Job | None = None
    place: int = 0
    left: RoomLeft | None = None
    stamp: str = ""  # names what was looked at; the page hands back that of the view it shows
    follower: _Follower | None = None

    @property
    def seen(self) -> int | None:
        """How many rounds the model sees, the newest ones; None for all."""
        if self.left is None:
            return None
        left_out = self.live.left_out if self.live else self.left.left_out
        return self.left.rounds - left_out if left_out else None

    @property
    def last_reply(self) -> StoredMessage | None:
        return next((m for m in reversed(self.messages) if m.role == "assistant"), None)

    @property
    def can_continue(self) -> bool:
        """A reply that was cut short can be gone on with."""
        last = self.messages[-1] if self.messages else None
        return bool(
            not self.live
            and last
            and last.role == "assistant"
            and (last.state in ("stopped", "interrupted", "error") or last.finish_reason == "length")
        )


@dataclass(slots=True)
class Desk:
    """The collaborators of the page, and which tab is following what."""

    service: ChatService
    choice: Choice
    shelf: Shelf
    meter: Meter
    memory: Memory = field(init=False)
    _followers: dict[str, _Follower] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = Memory(self.service, self.choice, self.meter)

    def view(self, conversation_id: str, limit: int = PAGE_OF_MESSAGES) -> View:
        """Raises NotFound where there is no such conversation."""
        if not conversation_id:
            return View()
        live = self.service.live(conversation_id)
        messages = self.service.store.thread(conversation_id, newest=limit + 1)
        place = self.service.place(live) if live else 0
        left = self.room_left(conversation_id)
        return View(tuple(messages[-limit:]), len(messages) > limit, live, place, left)

    async def follow(self, tab: str, conversation_id: str, limit: int) -> AsyncIterator[View]:
        """Views of a conversation while its reply grows, the last one when nothing is being written.

        A tab follows one conversation at a time: a later call ends the earlier one. The pace slows
        with the reply's length, since a browser lays the whole message out anew each time.
        """
        me = self._new_follower(tab)
        view, revision = View(), -1
        while True:
            me.beat = time.monotonic()
            live = self.service.live(conversation_id)
            if not view.stamp or live is not view.live:  # the first look, or a reply has begun or ended
                stamp = self._newest(conversation_id)
                view = await asyncio.to_thread(self.view, conversation_id, limit)
                view = replace(view, stamp=f"{stamp}:live" if view.live else stamp, follower=me)
                if not self.is_followed_by(tab, me):
                    return
                yield view
            elif live and (live.revision != revision or live.progress is not None):
                revision = live.revision
                view = replace(view, place=self.service.place(live))
                yield view
            if view.live is None:
                return
            pace = UPDATE_SECONDS * max(1.0, len(view.live.content) / CALM_CHARACTERS)
            await asyncio.sleep(min(pace, 1.0))
            if not self.is_followed_by(tab, me):
                return

    def is_followed_by(self, tab: str, follower: _Follower | None) -> bool:
        """False once a later follower has taken the tab over: no earlier view may come after its own."""
        return self._followers.get(tab) is follower

    def _new_follower(self, tab: str) -> _Follower:
        self._followers.pop(tab, None)
        self._followers[tab] = follower = _Follower()
        if len(self._followers) > MOST_TABS:  # the oldest is a tab of long ago
            self._followers.pop(next(iter(self._followers)))
        return follower

    def _newest(self, conversation_id: str) -> str:
        """Names what is saved of a conversation now."""
        return f"{conversation_id}:{self.service.revision(conversation_id)}"

    def needs_follower(self, tab: str, conversation_id: str, showing: str) -> bool:
        """Whether this tab shows something old: a reply that nobody follows, news from another tab, or a view
        that came late. showing: the stamp of the view the page shows."""
        if self.service.live(conversation_id):
            follower = self._followers.get(tab) or _Follower()
            return time.monotonic() - follower.beat > FOLLOWER_GONE_SECONDS
        return showing != self._newest(conversation_id)

    def open_conversation(self, wished: str) -> str:
        """The conversation to show first: the one wished for, or "" (a new one)."""
        try:
            return wished if wished and self.service.store.get_conversation(wished).deleted_at is None else ""
        except NotFound:
            return ""

    def show_version(self, conversation_id: str, step: int) -> None:
        """Read the version of the last reply that comes `step` after the one shown, round and round."""
        last = self.view(conversation_id).last_reply
        if last is None:
            return
        siblings = self.service.store.versions(last.id)
        chosen = siblings[(siblings.index(last.id) + step) % len(siblings)]
        self.service.select_version(conversation_id, chosen)

    # The engine

    def models(self, language: str) -> list[tuple[str, str]]:
        """(label, name) of every model at hand, the chosen folder among them."""
        chosen = self.choice.settings
        found = installed.models(chosen.data_dir)
        here = [(i18n.text(language, m.label) if m.label else m.name, m.name) for m in found]
        if chosen.model and chosen.model not in [name for _, name in here]:
            here.append((Path(chosen.model).name, chosen.model))
        return here

    def devices(self, language: str) -> list[tuple[str, str]]:
        """(label, name) of every device this machine has, "auto" first."""
        cards = visible(self.meter.read(None).cards)
        names = ["auto", "cpu", *cards, *(["mixed"] if cards else [])]
        if sys.platform == "darwin" and platform.machine() == "arm64":
            names.append("mps")
        if (chosen := self.choice.settings.device) not in names:  # given by a flag, or a card that is gone
            names.append(chosen)
        labels = {name: f"{card.name} ({name})" for name, card in cards.items()}
        words = i18n.table(language)
        return [(labels.get(name) or words.get(f"settings.device_{name}", name), name) for name in names]

    def examine(self) -> list[Finding]:
        """What the doctor finds now. Takes some seconds."""
        settings = self.choice.settings
        _, error = read_settings({"data_dir": settings.data_dir})
        info = self.service.engine.info()
        engine = None if info.pid is None else self.meter.read(info.pid)
        return examine(this_machine(settings, error, encoding="", engine=engine, loaded=info))

    @property
    def cores(self) -> int:
        return count_physical_cores()

    def choose(self, **changes: Any) -> None:
        """Check, keep and save what the page changed; the engine takes it up with the next message."""
        refuse_elsewhere(changes.get("model") or "")
        settings = self.choice.change(**changes)
        if "idle_minutes" in changes:
            self.service.engine.set_idle_seconds(settings.idle_minutes * 60)

    # Sending

    def outlook(self, conversation_id: str, text: str, settings: ChatSettings, tab: str) -> Outlook | None:
        """What memory has room for, where it lacks room for this message and something helps; else None.

        Raises what `send` would raise in an idle conversation.
        """
        self.service.check(text, tab)
        if self.service.live(conversation_id):
            return None
        return _to_choose_from(lambda: self.service.outlook(conversation_id, text, settings))

    def outlook_again(self, conversation_id: str, wish: Again) -> Outlook | None:
        """The same for another answer to the newest message, or for the last reply's going on."""
        if self.service.live(conversation_id):
            return None
        return _to_choose_from(lambda: self.service.outlook_again(conversation_id, wish))

    def room_left(self, conversation_id: str) -> RoomLeft | None:
        """What the conversation leaves for its next message; None before its first."""
        return self.service.room_left(conversation_id) if conversation_id else None

    def take_offer(self, act: str, outlook: Outlook) -> Once:
        """What the reply is to be asked for with; a wish that is kept is kept at once."""
        if act == "shorter":
            return Once(max_new_tokens=outlook.reply_room)
        if act == "on_cpu":
            return Once(device="cpu")
        if act == "move_layers":
            self.choose(device="mixed", layers_on_gpu=outlook.layers_left)
        return Once()  # the oldest rounds are left out by themselves

    def send(
        self, conversation_id: str, text: str, settings: ChatSettings, tab: str, once: Once = USUAL
    ) -> str:
        """Send, in a new conversation where there is none yet; its id."""
        self.service.check(text, tab)
        if not conversation_id:
            conversation_id = self.service.new_conversation(settings).id
        self.service.send(conversation_id, text, client=tab, once=once)
        return conversation_id

    def again(self, conversation_id: str, wish: Again, tab: str, once: Once = USUAL) -> None:
        """Answer the newest message once more, or let the last reply go on."""
        if wish == "regenerate":
            self.service.regenerate(conversation_id, client=tab, once=once)
        elif reply := self.view(conversation_id).last_reply:
            self.service.resume(reply.id, client=tab, once=once)


def _to_choose_from(look: Callable[[], Outlook | None]) -> Outlook | None:
    with suppress(InvalidInput):  # beyond max_length: the reply tells it, and the message is kept
        outlook = look()
        return outlook if outlook and not outlook.fits and outlook.can_be_helped else None
    return None
