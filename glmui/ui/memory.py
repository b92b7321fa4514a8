"""The model's memory, as the page asks for it: what it will take, and giving all of it back now."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from glmui.chat import ChatService
from glmui.choice import Choice
from glmui.memory.forecast import Forecast
from glmui.memory.model_size import CPU
from glmui.memory.visible import in_use
from glmui.meter import Card, Meter, Reading
from glmui.settings import Settings
from glmui.types import EngineInfo, EngineSpec

SETTLE_SECONDS = 3.0  # a driver counts freed memory as free a little after the process has ended
_POLL_SECONDS = 0.1
_SEEN = 50_000_000  # bytes: a fall that is the engine's end, where what it held of a card cannot be told


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a model will take of the memory. held: the engine, where it takes just this now.

    most: layers that fit on the cards, told only where the plan is short of something.
    """

    found: Forecast
    held: EngineInfo | None = None
    most: int = 0

    @property
    def short(self) -> Mapping[str, int]:
        """Bytes that are missing, by device. What is loaded has had its memory."""
        return {} if self.held else self.found.plan.short

    @property
    def room(self) -> int:
        """The most tokens of prompt and reply that there is memory for."""
        return self.held.context_room if self.held and self.held.context_room else self.found.room


@dataclass(frozen=True, slots=True)
class Freed:
    """ram: bytes that the engine held, and holds. cards: each it was on, as it was and as it is."""

    ram: tuple[int | None, int]
    cards: tuple[tuple[Card, Card], ...]

    @property
    def told(self) -> bool:
        """Whether every card tells of the end by now."""
        return all(_has_fallen(before, after.used) for before, after in self.cards)


class Memory:
    def __init__(self, service: ChatService, choice: Choice, meter: Meter) -> None:
        self._service = service
        self._choice = choice
        self._meter = meter
        self.freeing = False  # meanwhile drivers tell of memory that is nobody's any more

    @property
    def settings(self) -> Settings:
        return self._choice.settings

    def prospect(self, layers: int | None) -> Prospect | None:
        """What the chosen model will take; None where no plan knows it.

        layers: how many go on the cards where the device is "mixed", None for as many as fit.
        Raises NotFound or ModelError for its folder, InvalidInput for its device.
        """
        spec = self._choice.spec()
        if spec is None:
            return None
        if spec.device == "mixed":
            spec = replace(spec, layers_on_gpu=layers)
        if self._service.holds(spec):
            return self._held(spec, self._service.engine.info())
        found = self._service.foresee(spec)
        return Prospect(found, most=self._most(spec, found)) if found else None

    def _held(self, spec: EngineSpec, info: EngineInfo) -> Prospect | None:
        """As it is: what is free has changed since it was loaded, its layers have not."""
        if info.layers:
            on_cards = sum(device != CPU for device in info.layers)
            context = min(spec.context, info.context_room or spec.context)  # no more is kept
            device = "mixed" if on_cards else CPU
            spec = replace(spec, device=device, layers_on_gpu=on_cards, context=context)
        found = self._service.foresee(spec)
        return Prospect(found, held=info) if found else None

    def _most(self, spec: EngineSpec, found: Forecast) -> int:
        if not (found.plan.short and found.machine.cards):
            return 0
        widest = self._service.foresee(replace(spec, device="mixed", layers_on_gpu=None))
        return widest.plan.layers_on_card if widest and widest.plan.works else 0

    def free(self) -> Freed | None:
        """End the engine process and wait until the cards tell of it; None where no model was loaded."""
        info = self._service.engine.info()
        if info.pid is None:
            return None
        self.freeing = True
        try:
            return self._freed(info, info.pid)
        finally:
            self.freeing = False

    def _freed(self, info: EngineInfo, pid: int) -> Freed:
        before = self._meter.read(pid)
        computing = in_use(before.cards, info)  # for Windows, where a card does not tell of each program
        used = [card for card in before.cards if card.own or (card.own is None and card in computing)]
        self._service.engine.unload()
        after = self._settled(pid, used)
        now = {card.index: card for card in after.cards}
        pairs = tuple((card, now.get(card.index, card)) for card in used)
        return Freed((before.engine_rss, after.engine_rss or 0), pairs)

    def _settled(self, pid: int, used: list[Card]) -> Reading:
        """The reading once what the process held of these cards is free, or SETTLE_SECONDS later."""
        end = time.monotonic() + SETTLE_SECONDS
        while True:
            reading = self._meter.read(pid)
            now = {card.index: card.used for card in reading.cards}
            if all(_has_fallen(card, now.get(card.index)) for card in used) or time.monotonic() > end:
                return reading
            time.sleep(_POLL_SECONDS)


def _has_fallen(card: Card, used: int | None) -> bool:
    if card.used is None or used is None:
        return True  # nothing to wait for
    return card.used - used >= (card.own // 2 if card.own else _SEEN)
