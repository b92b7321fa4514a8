"""Where the chosen ChatGLM would go with the memory that is free, and how long a conversation could get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from glmui.doctor.finding import Finding, ok, warning
from glmui.doctor.world import World
from glmui.errors import GlmuiError
from glmui.settings import spec_of

if TYPE_CHECKING:
    from glmui.memory.forecast import Forecast
    from glmui.memory.plan_request import Machine


def plan(world: World) -> Iterator[Finding]:
    """Nothing where no ChatGLM is chosen; what is wrong with its folder or the device, other checks tell."""
    from glmui.memory import forecast
    from glmui.memory.model_size import CPU
    from glmui.tools.plan import table

    if (found := _foreseen(world)) is None:
        return
    made, size = found.plan, found.size

    def where(language: str) -> str:
        return forecast.sentence(made, size, language)

    def advice(language: str) -> str:
        return forecast.advice(made, size, language)

    def also(language: str) -> str:
        return f" {said}" if (said := advice(language)) else ""

    def rows(language: str) -> str:
        return "\n" + "\n".join(table(forecast.rows_of(made, size, language)))

    if short := made.short:
        device = max(short, key=lambda name: short[name])
        name, gb = "RAM" if device == CPU else device, f"{short[device] / 1e9:.1f}"
        yield warning("plan", "plan_short", where=where, advice=advice, rows=rows, device=name, gb=gb)
    else:
        room = f"{found.room // 10 * 10:,}"
        yield ok("plan", "plan_fine", where=where, room=room, advice=also, rows=rows)


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
    """As torch sees it, which knows best what cards it can use, and as if our own engine were gone."""
    from glmui.memory.plan_request import Machine

    facts, own = world.torch().facts, _held(world)
    cards = facts.get("cards", []) if facts.get("visible") else []
    held = (*own.cards, *[0] * len(cards))
    free = tuple(_free(card, more) for card, more in zip(cards, held, strict=False))
    now = world.memory()
    return Machine(free, min(now.total, now.available + own.ram))


def _free(card: Mapping[str, Any], held: int) -> int:
    """0 for a card that torch could not ask."""
    return min(int(card["total"]), int(card["free"]) + held) if "free" in card else 0


def _held(world: World) -> Machine:
    """What our own engine process holds of each."""
    from glmui.memory.forecast import machine_of
    from glmui.memory.plan_request import Machine

    if world.engine is None:
        return Machine((), 0)
    with_it, without = (machine_of(world.engine, each, world.environ) for each in (world.loaded, None))
    if with_it is None or without is None:
        return Machine((), 0)
    cards = (free - taken for free, taken in zip(with_it.cards, without.cards, strict=True))
    return Machine(tuple(cards), with_it.ram - without.ram)
