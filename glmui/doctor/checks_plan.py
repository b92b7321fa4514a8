"""Where the chosen ChatGLM would go with the memory that is free, and how long a conversation could get."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from glmui.doctor.finding import Finding, ok, warning
from glmui.doctor.world import World
from glmui.errors import GlmuiError
from glmui.settings import spec_of

if TYPE_CHECKING:
    from glmui.memory.forecast import Forecast
    from glmui.memory.plan import Machine


def plan(world: World) -> Iterator[Finding]:
    """Nothing where no ChatGLM is chosen; what is wrong with its folder or the device, other checks tell."""
    from glmui.memory.forecast import explain
    from glmui.memory.model_size import CPU

    if (found := _foreseen(world)) is None:
        return

    def where(language: str) -> str:
        return explain(found.plan, found.size, language).sentence

    def advice(language: str) -> str:
        return explain(found.plan, found.size, language).advice

    def also(language: str) -> str:
        return f" {advice(language)}" if advice(language) else ""

    if short := found.plan.short:
        device = max(short, key=lambda name: short[name])
        name, gb = "RAM" if device == CPU else device, f"{short[device] / 1e9:.1f}"
        yield warning("plan", "plan_short", where=where, advice=advice, device=name, gb=gb)
    else:
        yield ok("plan", "plan_fine", where=where, room=f"{found.room // 10 * 10:,}", advice=also)


def _foreseen(world: World) -> Forecast | None:
    from glmui.hub.installed import resolve
    from glmui.memory.forecast import foreseen, size_of

    chosen = world.settings.model
    if not chosen:
        return None
    try:
        spec = spec_of(world.settings, chosen, resolve(chosen, world.data_dir))
        size = size_of(spec)
        return foreseen(spec, size, _machine(world)) if size else None
    except GlmuiError:
        return None


def _machine(world: World) -> Machine:
    """As torch sees it, which knows best what cards it can use."""
    from glmui.memory.plan import Machine

    facts = world.torch().facts
    cards = facts.get("cards", []) if facts.get("visible") else []
    return Machine(tuple(int(card.get("free", 0)) for card in cards), world.memory().available)
