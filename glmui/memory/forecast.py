"""What a model will take on this machine, told before anything is loaded, in the app process: no torch."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from glmui import i18n
from glmui.engine.model_folder import describe
from glmui.glm.config import read_config
from glmui.memory.fitting import context_that_fits, layers_that_fit, lighter, room, wish_of
from glmui.memory.model_size import CPU, ModelSize
from glmui.memory.plan import CUDA_CONTEXT, Machine, Plan, Wish, plan, program_bytes
from glmui.memory.pretended import pretended
from glmui.meter import Card, Reading
from glmui.types import BITS, EngineSpec

Say = Callable[..., str]

# What a Windows desktop holds of a card, where the driver does not tell whose memory is whose.
_DESKTOP = 1_000_000_000
_ROCM = Path("/dev/kfd")  # there where Linux can compute on an AMD card


@dataclass(frozen=True, slots=True)
class Forecast:
    """room: the most tokens of prompt and reply that the plan has memory for."""

    size: ModelSize
    machine: Machine
    plan: Plan
    room: int


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a plan's table. part: in words. device: "cpu", "cuda:0" …. size: bytes."""

    part: str
    device: str
    size: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """sentence: where the layers go. rows: what is where; those of a device add up to what it takes.
    notes: how full each device gets, what is missing, and at their end the advice: what could be done about
    it, "" where all is well.
    """

    sentence: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    advice: str


def forecast(spec: EngineSpec, reading: Reading, held: bool = False) -> Forecast | None:
    """What becomes of `spec` with the memory of `reading`; None for a model or a device that no plan knows.

    held: whether the engine process of `reading` has a model loaded: what it holds counts as free. A few
    milliseconds: what a slider would bring about is asked with replace(spec, layers_on_gpu=N).
    Raises ModelError for the folder, InvalidInput("device_missing") for the device.
    """
    known = pretended(spec) or _known(spec, reading, held)
    if known is None:
        return None
    return foreseen(spec, *known)


def foreseen(spec: EngineSpec, size: ModelSize, machine: Machine) -> Forecast | None:
    """The same for a model of that size and a machine. Raises InvalidInput("device_missing")."""
    machine = replace(machine, cards=tuple(min(free, spec.vram_cap or free) for free in machine.cards))
    if not machine.cards and spec.device != CPU and (spec.device == "mps" or _has_other_card()):
        return None
    found = plan(size, machine, wish_of(spec))
    return Forecast(size, machine, found, room(spec, size, found))


def _known(spec: EngineSpec, reading: Reading, held: bool) -> tuple[ModelSize, Machine] | None:
    machine = machine_of(reading, held)
    if machine is None or (size := size_of(spec)) is None:
        return None
    return size, machine


def size_of(spec: EngineSpec) -> ModelSize | None:
    """The size of a spec's model, None where it is none of the ChatGLMs. Raises ModelError."""
    if describe(spec.folder).family != "chatglm":
        return None
    return ModelSize.of(read_config(Path(spec.folder), spec.chatglm_family), BITS[spec.quantize])


def machine_of(
    reading: Reading, held: bool = False, environ: Mapping[str, str] = os.environ
) -> Machine | None:
    """What is free here; None where the RAM cannot be read."""
    if reading.ram_total is None or reading.ram_used is None:
        return None
    free = reading.ram_total - reading.ram_used + (reading.engine_private or 0) * held
    cards = _visible(reading.cards, environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(tuple(_free(card, held) for card in cards), min(free, reading.ram_total))


def _visible(cards: Sequence[Card], wish: str | None) -> Sequence[Card]:
    """The cards that torch will see, in its order. (Where the variable holds their names: all.)"""
    names = [name.strip() for name in (wish or "").split(",")] if wish is not None else []
    if wish is not None and not all(name.isdecimal() for name in names):
        return () if wish.strip() in ("", "-1") else cards
    by_index = {card.index: card for card in cards}
    return cards if wish is None else [by_index[int(name)] for name in names if int(name) in by_index]


def _free(card: Card, held: bool) -> int:
    if card.total is None or card.used is None:
        return 0
    own = card.own if card.own is not None else max(0, card.used - _DESKTOP)
    return min(card.total, card.total - card.used + own * held)


def _has_other_card() -> bool:
    """Whether there may be a card that torch can use and NVML knows nothing of: Apple's or AMD's."""
    is_apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return is_apple or _ROCM.exists()


def explain(found: Plan, size: ModelSize, language: str) -> Explanation:
    """A plan in words: for the command line, the doctor and the page."""

    def say(key: str, **values: Any) -> str:
        return i18n.text(language, f"plan.{key}", **values)

    on_card = found.layers_on_card
    count = {"on_card": on_card, "on_cpu": size.layers - on_card, "layers": size.layers}
    sentence = say(found.reason, **count, context=f"{found.wish.context:,}")
    advice = _advice(found, size, say)
    notes = (*_notes(found, say), *([advice] if advice else []))
    return Explanation(sentence, tuple(_rows(found, size, say)), notes, advice)


def _rows(found: Plan, size: ModelSize, say: Say) -> Iterator[Row]:
    wish = found.wish
    apart = size.embedding_apart(wish.head_bits)
    if apart:
        yield Row(say("embedding"), found.embedding, 0)
    yield Row(say("head" if apart else "table"), found.head, size.head_bytes(found.head, wish.head_bits))
    for device, group in groupby(enumerate(found.layers), key=lambda pair: pair[1]):
        numbers = [number for number, _ in group]
        each = size.layer_bytes(device) + size.cache_bytes(device, wish.context, wish.cache)
        key = "layers" if len(numbers) > 1 else "layer"
        yield Row(say(key, first=numbers[0], last=numbers[-1]), device, len(numbers) * each)
    for device in dict.fromkeys(found.layers):
        scratch = size.scratch_bytes(device, wish.context, wish.cache, wish.piece)
        yield Row(say("scratch", piece=wish.piece), device, scratch)
    yield Row(say("program"), CPU, program_bytes(found.head))


def _notes(found: Plan, say: Say) -> Iterator[str]:
    for device, need in found.on.items():
        key = "card" if device != CPU else "ram_mapped" if found.mapped else "ram"
        yield say(key, device=device, gb=_gb(need), cuda=CUDA_CONTEXT / 1e9, mapped=_gb(found.mapped))
    for device, missing in found.short.items():
        yield say("short_ram" if device == CPU else "short", device=device, gb=_gb(missing))


def _advice(found: Plan, size: ModelSize, say: Say) -> str:
    """What could be done where something is short, or layers could be on a card and are not."""
    if not found.short:
        less = lighter(size, found)
        return say(_sacrifice(less, found.wish), layers=size.layers) if less else ""
    if fits := context_that_fits(size, found.machine, found.wish):
        return say("shorter_context", context=fits)
    if most := layers_that_fit(size, found):
        return say("fewer_layers", most=most, layers=size.layers)
    if set(found.short) == {CPU} and found.short[CPU] <= found.mapped:
        return say("from_disk")
    return say("smaller_model" if size.bits > 4 else "close_programs")


def _sacrifice(less: Wish, wish: Wish) -> str:
    """In which of the two a lighter wish differs."""
    if less.cache == wish.cache:
        return "lighter_head"
    return "lighter_cache" if less.head_bits == wish.head_bits else "lighter_both"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f}"
