"""The models as one look finds them: what each is, how it stands, and whether there is room for it here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glmui.downloads import Task
from glmui.hub.catalogue import Offer
from glmui.hub.get import Removed
from glmui.hub.installed import InstalledModel
from glmui.memory.free import free_on, free_ram
from glmui.memory.visible import held_by
from glmui.meter import Reading
from glmui.types import EngineInfo

FIRST = "chatglm-6b-int4"  # what the welcome offers first

State = Literal["loaded", "chosen", "here", "damaged", "half", "offered"]


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that a model needs and where it would come from, in bytes. card: its name, "" for RAM."""

    card: str
    need: int
    free: int
    total: int

    @property
    def met(self) -> bool:
        return self.free >= self.need


@dataclass(frozen=True, slots=True)
class Entry:
    """One model: offered, here, or both. fetched: bytes of a fetch that was broken off."""

    name: str
    state: State
    offer: Offer | None = None
    model: InstalledModel | None = None
    fetched: int = 0
    needs: tuple[Need, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether some memory of this computer is free for it now, as far as that can be told."""
        return not self.needs or any(need.met for need in self.needs)

    @property
    def chats(self) -> bool:
        return (
            self.model.family is not None if self.model else bool(self.offer and self.offer.purpose == "chat")
        )


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the shelf. Bytes; removed: newest first."""

    folder: Path
    disk_free: int
    memory: Reading
    here: tuple[Entry, ...]
    offered: tuple[Entry, ...]
    removed: tuple[Removed, ...]
    task: Task | None
    paused: bool
    checks: Mapping[str, Task]

    def entry(self, name: str) -> Entry | None:
        return next((entry for entry in (*self.here, *self.offered) if entry.name == name), None)


def needs_of(offer: Offer, memory: Reading, engine: EngineInfo) -> tuple[Need, ...]:
    """What a model would take of each kind of memory this computer has; what cannot be told is left out.

    What the engine holds now counts as free: it holds one model at a time.
    """
    loaded = memory.engine_rss is not None
    ours = held_by(memory.cards, engine if loaded else None)
    needs = [
        Need(
            card.name or f"cuda:{card.index}", _bytes(offer.vram_gb), free_on(card, card in ours), card.total
        )
        for card in memory.cards
        if offer.vram_gb and card.used is not None and card.total is not None
    ]
    if memory.ram_total and (free := free_ram(memory, loaded)) is not None:
        needs.append(Need("", _bytes(offer.ram_gb), free, memory.ram_total))
    return tuple(needs)


def _bytes(gigabytes: float) -> int:
    return int(gigabytes * 1e9)
