"""What a model takes of the memory: a line, what to do where it is short, a small table. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from glmui.i18n import Words
from glmui.memory.fitting import context_that_fits, slow_context
from glmui.memory.forecast import Forecast, advice, explain, rows_of, sentence
from glmui.memory.model_size import CPU
from glmui.memory.plan_request import CUDA_CONTEXT, budget
from glmui.ui.memory import Freed, Prospect
from glmui.ui.present import size
from glmui.ui.present_outlook import about

_SPOKEN = ' role="status"'


def whole(layers: float | None) -> int:
    """The slider's number: None while its box is empty, anything while it is typed."""
    return max(0, int(layers or 0))


def line(prospect: Prospect, say: Words, spoken: bool = False) -> str:
    """How much is on the card and what comes of it, and what to do where it does not fit.

    spoken: by screen readers, as the answer to their reader's own hand; what changes by itself is not.
    """
    cure = _cure(prospect, say)
    told = f"<p>{escape(_summary(prospect, say))}</p>" + (f"<p>{escape(cure)}</p>" if cure else "")
    return f'<div class="plan{" short" * bool(cure)}"{_SPOKEN * spoken}>{told}</div>'


def trouble(words: str) -> str:
    """In the place of a plan: why there is none."""
    return f'<div class="plan short"><p>{escape(words)}</p></div>'


def _summary(prospect: Prospect, say: Words) -> str:
    """How much is on the card, what that takes of what is free, and how long a conversation may get."""
    parts = [_layers(prospect.found.plan.layers, say), _share(prospect, say)]
    if prospect.short:
        parts.append(say("memory.short", size=size(max(prospect.short.values()))))
    if not prospect.short or prospect.found.plan.slow:
        parts.append(say("memory.room", tokens=about(prospect.room)))
    return " · ".join(parts)


def _layers(devices: Sequence[str], say: Words) -> str:
    on_cards = [device for device in devices if device != CPU]
    cards = len(set(on_cards))
    if not cards:
        return say("memory.on_cpu")
    key = "memory.all_on_card" if len(on_cards) == len(devices) else "memory.on_card"
    key += "s" * (cards > 1)
    return say(key, count=len(on_cards), layers=len(devices), cards=cards)


def _share(prospect: Prospect, say: Words) -> str:
    """What it needs of what is free: on the cards where any is used, of RAM where only that is short."""
    plan = prospect.found.plan
    cards = [device for device in plan.on if device != CPU]
    of_ram = not cards or set(prospect.short) == {CPU}
    used, beside = ([CPU], 0) if of_ram else (cards, CUDA_CONTEXT * len(cards))  # no plan counts CUDA itself
    need = sum(plan.on[device] for device in used) + beside
    free = sum(budget(plan.machine, plan.request, device) for device in used) + beside
    return say("memory.ram" if of_ram else "memory.vram", need=_gb(need), free=_gb(max(0, free)))


def _gb(count: int) -> str:
    """Whole ones where there are many: what is free flickers."""
    return f"{count / 1e9:.1f}" if count < 10e9 else f"{count // 10**9}"


def _cure(prospect: Prospect, say: Words) -> str:
    """What to do where something is short; "" where nothing is."""
    if not prospect.short:
        return ""
    if set(prospect.short) == {CPU}:
        return _cure_of_ram(prospect.found, say)
    if not prospect.most:
        return say("memory.cure_card")
    by_hand = prospect.found.plan.request.device == "mixed"
    return say("memory.cure_layers" if by_hand else "memory.cure_mixed", most=prospect.most)


def _cure_of_ram(found: Forecast, say: Words) -> str:
    if fits := context_that_fits(found.size, found.machine, found.plan.request):
        key = "memory.cure_slow" if found.plan.slow else "memory.cure_context"
        return say(key, tokens=about(fits))
    if slow := slow_context(found.size, found.plan):
        return say("memory.cure_slow_if_shorter", tokens=about(slow))
    return advice(found.plan, found.size, say.language)


# The table


def table(prospect: Prospect, say: Words) -> str:
    """Where each part is, or will be, and how much it takes there."""
    plan, model = prospect.found.plan, prospect.found.size
    several = len(plan.machine.cards) > 1
    rows = "".join(
        f'<tr><th scope="row">{escape(row.part)}</th><td>{_device(row.device, several)}</td>'
        f"<td>{row.size / 1e6:,.0f} MB</td></tr>"
        for row in rows_of(plan, model, say.language)
    )
    above = say(
        "memory.now" if prospect.held else "memory.next", sentence=sentence(plan, model, say.language)
    )
    cache = say("memory.cache", size=size(_cache(prospect.found)), tokens=f"{plan.request.context:,}")
    notes = [cache, *([] if prospect.short else explain(plan, model, say.language).notes)]
    return f"<p>{escape(above)}</p><table><tbody>{rows}</tbody></table>" + "".join(
        f"<p>{escape(note)}</p>" for note in notes
    )


def _device(device: str, several: bool) -> str:
    number = device.partition(":")[2] if several else ""
    return "CPU" if device == CPU else f"GPU {number}".strip()


def _cache(found: Forecast) -> int:
    """Bytes that keys and values take in all layers."""
    asked = found.plan.request
    return sum(found.size.cache_bytes(device, asked.context, asked.kv_cache) for device in found.plan.layers)


# Set free


def spoken(sentences: Iterable[str]) -> str:
    """Sentences that screen readers read out when they change."""
    return f"<div{_SPOKEN}>{''.join(f'<p>{escape(words)}</p>' for words in sentences)}</div>"


def freed(freed: Freed | None, say: Words) -> Iterator[str]:
    """What giving the memory back has changed, in sentences."""
    if freed is None:
        yield say("settings.nothing_loaded")
        return
    for before, after in freed.cards:
        name = before.name or say("meter.card", index=before.index)
        yield say("settings.freed_card", card=name, before=size(before.used), after=size(after.used))
    yield say("settings.freed", before=size(freed.ram[0]), after=size(freed.ram[1]))
    if not freed.told:
        yield say("settings.not_fallen")
    yield say("settings.loads_again")
