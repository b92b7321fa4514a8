"""Notices a reply that was slow because its card had no memory left, and says who holds it.

A full card does not always end in an error: Windows moves a part of what a program holds there into ordinary
RAM, and everything goes on, many times slower. From outside that shows as a reply far slower than others were
on this machine, while the card is nearly full. What is usual is remembered in the data folder.
"""

from __future__ import annotations

import json
import logging
import platform
import statistics
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from glmui import notes
from glmui.memory.visible import in_use
from glmui.meter import Card, Meter, User
from glmui.types import EngineInfo, Usage

log = logging.getLogger(__name__)

FILE = "speeds.json"  # in the data folder
FAR_UNDER = 0.4  # of the usual speed
NEARLY_FULL = 0.95
LEAST_TOKENS = 16  # of a reply whose speed says something
LEAST_REPLIES, MOST_REPLIES = 3, 20  # of the past, to compare with
_SHORT = 256  # tokens of context up to which its length costs next to nothing
_MOST_MODELS = 32


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one reply: tokens a second, and the tokens before its middle."""

    per_second: float
    context: int


def speed_of(usage: Usage) -> Speed | None:
    """None where the reply is too short to tell. Reading the prompt does not count."""
    if usage.completion_tokens < LEAST_TOKENS or usage.tokens_per_second <= 0:
        return None
    return Speed(usage.tokens_per_second, usage.prompt_tokens + usage.completion_tokens // 2)


def usual(past: Sequence[Speed], context: int) -> float | None:
    """What replies at this context usually have, None where too few are known.

    A longer context is slower, at worst in proportion. So only replies with at least half of it count: those
    cannot have been more than twice as fast for that reason alone, and FAR_UNDER is less than a half.
    """
    alike = [s.per_second for s in past if max(s.context, _SHORT) >= max(context, _SHORT) / 2]
    return statistics.median(alike) if len(alike) >= LEAST_REPLIES else None


class Speeds:
    """The last replies' speeds of each model and way to run it, kept in a file over restarts."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, list[Speed]] | None = None

    def of(self, name: str) -> Sequence[Speed]:
        return self._all().get(name, ())

    def add(self, name: str, speed: Speed) -> None:
        """Remember one more, and what was used last longest."""
        known = self._all()
        known[name] = [*known.pop(name, []), speed][-MOST_REPLIES:]
        while len(known) > _MOST_MODELS:
            del known[next(iter(known))]
        self._save(known)

    def _all(self) -> dict[str, list[Speed]]:
        if self._known is None:
            self._known = {}
            with suppress(OSError, ValueError, TypeError, AttributeError):  # missing or damaged: begin anew
                values = json.loads(self._file.read_text(encoding="utf-8"))
                self._known = {
                    name: [Speed(float(s), int(c)) for s, c in kept] for name, kept in values.items()
                }
        return self._known

    def _save(self, known: Mapping[str, Sequence[Speed]]) -> None:
        values = {name: [(round(s.per_second, 2), s.context) for s in kept] for name, kept in known.items()}
        draft = self._file.with_suffix(".new")
        try:
            draft.write_text(json.dumps(values), encoding="utf-8")
            draft.replace(self._file)
        except OSError as error:
            log.warning("speeds could not be kept: %s", error)


class SpillWatch:
    """`remark` is told of every finished reply. Never raises, from any thread."""

    def __init__(self, meter: Meter, data_dir: Path, moves_to_ram: bool | None = None) -> None:
        self._meter = meter
        self._speeds = Speeds(data_dir / FILE)
        self._moves_to_ram = _is_windows() if moves_to_ram is None else moves_to_ram
        self._lock = threading.Lock()

    def remark(self, info: EngineInfo, usage: Usage) -> str:
        """Notes on a reply that was slow for want of VRAM; "" on any other, which is remembered."""
        speed = speed_of(usage)
        if speed is None or not info.device.startswith(("cuda", "mixed")):
            return ""
        name = way_of(info)
        with self._lock:
            normal = usual(self._speeds.of(name), speed.context)
            if normal and speed.per_second < FAR_UNDER * normal and (card := self._full_card(info)):
                return self._notes(speed, normal, card, info.pid)
            self._speeds.add(name, speed)
            return ""

    def _full_card(self, info: EngineInfo) -> Card | None:
        """The fullest of the cards that it computes on, where that is nearly full."""
        cards = in_use(self._meter.read(info.pid).cards, info)
        return max((card for card in cards if fullness(card) >= NEARLY_FULL), key=fullness, default=None)

    def _notes(self, speed: Speed, normal: float, card: Card, engine_pid: int | None) -> str:
        numbers = {
            "speed": f"{speed.per_second:.1f}",
            "usual": f"{normal:.1f}",
            "percent": f"{fullness(card):.0%}",
        }
        users = self._meter.users(card.index)
        who = notes.note("spill_users", users=listed(users, engine_pid)) if users else ""
        why = "spill_to_ram" if self._moves_to_ram else "spill"
        return notes.join(notes.note(why, **numbers), who)


def fullness(card: Card) -> float:
    return (card.used or 0) / card.total if card.total else 0.0


def way_of(info: EngineInfo) -> str:
    """A model and all that decides how fast it is here."""
    on_card = sum(device != "cpu" for device in info.layers)
    parts = (info.model, info.device, info.dtype, f"{on_card}/{len(info.layers)}", info.kernel, info.threads)
    return " ".join(map(str, parts))


def listed(users: Sequence[User], engine_pid: int | None) -> str:
    """Programs by name with what they hold, the engine process by ours."""
    return ", ".join(
        ("glmui" if user.pid == engine_pid else user.name)
        + (f" ({user.size / 1e9:.1f} GB)" if user.size is not None else "")
        for user in users
    )


def _is_windows() -> bool:
    """Whether a full card spills into RAM here: Windows' drivers do that, those that WSL borrows too."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()
