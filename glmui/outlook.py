"""How much more a conversation may take, and what would help where memory has no room for a message.

The engine knows the room it has once its model is loaded. What it would have asleep, or with other
settings, is forecast (memory/forecast.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from glmui import prompts
from glmui.engine.model_folder import describe
from glmui.errors import GlmuiError, InvalidInput, ModelError
from glmui.memory.forecast import Forecast, forecast, foreseen
from glmui.memory.model_size import CPU
from glmui.memory.spread import longest
from glmui.meter import Meter
from glmui.prompts import SHORTEST_REPLY, Limits, Prompt
from glmui.types import ChatEngine, ChatSettings, EngineSpec, Message, TokenCounter

Foresee = Callable[[EngineSpec], Forecast | None]

QUESTION = 64  # tokens of an ordinary next message
_BOUNDLESS = 2**60  # bytes
_STEP = 64  # a forecast's room is told in such steps: what other programs take changes all the time


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a message would meet. All but the layers are tokens or rounds.

    prompt_tokens: the message with all of the conversation that max_length allows. needed: that and a reply.
    room: what memory has room for. The rest is what would help, nothing where it would not:
    rounds_to_leave_out: of the oldest, counted as RoomLeft.for_room. cuts_reply: the reply that is to go on
    can do so where the model sees no more than its end. reply_room: the longest reply that is possible as it
    is. layers_to_move: from the cards to the CPU, where layers_left stay on the cards.
    """

    prompt_tokens: int
    needed: int
    room: int
    fits: bool = True
    rounds_to_leave_out: int = 0
    cuts_reply: bool = False
    reply_room: int = 0
    layers_to_move: int | None = None
    layers_left: int = 0
    fits_on_cpu: bool = False

    @property
    def can_be_helped(self) -> bool:
        """Whether there is anything to choose; a reply that only its end can go on from goes on so."""
        as_it_is = not self.cuts_reply and (self.rounds_to_leave_out or self.reply_room)
        return bool(as_it_is or self.layers_to_move or self.fits_on_cpu)


@dataclass(frozen=True, slots=True)
class RoomLeft:
    """What a conversation leaves for its next message and the reply.

    tokens: so many. rounds: that the conversation has. left_out: of these, the oldest, that the next message
    leaves out; for_room: how many of them for want of room, not because the reader wants no more. little:
    with all of them left out, an ordinary message would still have a reply shorter than is kept free for one.
    """

    tokens: int
    rounds: int
    left_out: int = 0
    for_room: int = 0
    little: bool = False


def foreseer(engine: ChatEngine, meter: Meter) -> Foresee:
    """Forecasts for this computer, where what `engine` holds counts as free."""

    def foresee(spec: EngineSpec) -> Forecast | None:
        info = engine.info()
        return forecast(spec, meter.read(info.pid), info if info.pid is not None else None)

    return foresee


class Rooms:
    """How many tokens prompt and reply may have together with a model, held or only imagined."""

    def __init__(self, engine: ChatEngine, foresee: Foresee) -> None:
        self._engine = engine
        self._foresee = foresee
        self._asked: EngineSpec | None = None  # what the engine was configured for last

    def configured(self, spec: EngineSpec) -> None:
        self._asked = spec

    def holds(self, spec: EngineSpec) -> bool:
        """Whether the engine is ready with just what this spec asks for."""
        asked = self._asked is not None and self._asked.base == spec.base
        return asked and self._engine.info().state == "ready"

    def limits(self, spec: EngineSpec) -> Limits:
        info = self._engine.info()
        if self.holds(spec):
            return Limits(info.context_length or _trained(spec), info.context_room)
        return Limits(_trained(spec), self._foreseen_room(spec) // _STEP * _STEP)

    def outlook(
        self, messages: Sequence[Message], settings: ChatSettings, spec: EngineSpec, count: TokenCounter
    ) -> Outlook:
        """What the last of these messages would meet, where memory has room for less than max_length.

        Raises InvalidInput where max_length itself is too small for it.
        """
        limits = self.limits(spec)
        length, room = limits.length(settings.params), limits.room
        wanted = prompts.compose(messages, settings, count, replace(limits, room=0))
        needed = min(length, wanted.tokens + prompts.reply_wish(settings.params, length))
        outlook = Outlook(wanted.tokens, needed, room)
        if needed <= room or wanted.tokens <= prompts.token_budget(settings.params, limits):
            return outlook
        on_cards = self._layers_on_cards(spec)
        left = self._layers_left(spec, on_cards, needed)
        cut = _cut(messages, settings, count, limits)
        return replace(
            outlook,
            fits=False,
            rounds_to_leave_out=_rounds_to_leave_out(messages, settings, cut, wanted) if cut else 0,
            cuts_reply=cut is not None and cut.cut and not wanted.cut,
            reply_room=max(0, room - wanted.tokens) if room - wanted.tokens >= SHORTEST_REPLY else 0,
            layers_to_move=on_cards - left if left else None,
            layers_left=left,
            fits_on_cpu=on_cards > 0 and self._foreseen_room(replace(spec, device=CPU)) >= needed,
        )

    def _forecast(self, spec: EngineSpec) -> Forecast | None:
        with suppress(GlmuiError):  # a folder or a card that is gone: loading tells of it
            return self._foresee(spec)
        return None

    def _foreseen_room(self, spec: EngineSpec) -> int:
        found = self._forecast(spec)
        return found.room if found else 0

    def _layers_on_cards(self, spec: EngineSpec) -> int:
        if self.holds(spec):
            return sum(device != CPU for device in self._engine.info().layers)
        found = self._forecast(spec)
        return found.plan.layers_on_card if found else 0

    def _layers_left(self, spec: EngineSpec, on_cards: int, needed: int) -> int:
        """The most layers that cards can keep so that there is room; 0 where moving some would not help.

        Sought by the cards alone, which gain room with every layer that leaves them; the RAM loses it.
        """
        found = self._forecast(spec) if on_cards > 1 else None
        if found is None:
            return 0

        def fits(left: int, ram: int = _BOUNDLESS) -> bool:
            return _room(replace(spec, device="mixed", layers_on_gpu=left), found, ram) >= needed

        left = longest(fits, on_cards - 1)
        return left if left and fits(left, found.machine.ram) else 0


def _room(spec: EngineSpec, found: Forecast, ram: int) -> int:
    """What `spec` would have room for where `found` was made, with so much RAM."""
    with suppress(InvalidInput):  # cards that have gone meanwhile
        changed = foreseen(spec, found.size, replace(found.machine, ram=ram))
        return changed.room if changed else 0
    return 0


def _cut(
    messages: Sequence[Message], settings: ChatSettings, count: TokenCounter, limits: Limits
) -> Prompt | None:
    """The prompt cut to the room there is; None where the newest round alone leaves too little of it."""
    with suppress(InvalidInput):
        cut = prompts.compose(messages, settings, count, limits)
        if cut.tokens <= prompts.token_budget(settings.params, limits):
            return cut
    return None


def _rounds_to_leave_out(
    messages: Sequence[Message], settings: ChatSettings, cut: Prompt, wanted: Prompt
) -> int:
    if cut.left_out <= wanted.left_out:
        return 0
    rounds = len(prompts.split_rounds(messages)) - 1
    return _for_room(cut.left_out, rounds, settings) or cut.left_out - wanted.left_out


def _for_room(left_out: int, rounds: int, settings: ChatSettings) -> int:
    """How many of the rounds that are left out the reader would rather have kept."""
    if settings.history == "tokens":
        return 0
    unwanted = max(0, rounds - settings.history_rounds) if settings.history == "rounds" else 0
    return max(0, left_out - unwanted)


def room_left(
    messages: Sequence[Message], settings: ChatSettings, count: TokenCounter, limits: Limits
) -> RoomLeft:
    """What a conversation leaves for its next message. Raises InvalidInput where the system text alone is
    too long."""
    params, blank = settings.params, Message("user", "")
    prompt = prompts.compose([*messages, blank], settings, count, limits)
    alone = prompts.compose([blank], settings, count, limits)
    length = limits.length(params)
    rounds = len(prompts.split_rounds(messages))
    return RoomLeft(
        tokens=max(0, min(length, limits.room or length) - prompt.tokens),
        rounds=rounds,
        left_out=prompt.left_out,
        for_room=_for_room(prompt.left_out, rounds, settings),
        little=alone.tokens + QUESTION > prompts.token_budget(params, limits),
    )


def _trained(spec: EngineSpec) -> int:
    with suppress(ModelError):
        return describe(spec.folder).context_length
    return 0
