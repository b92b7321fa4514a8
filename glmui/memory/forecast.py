"""What a model will take on this machine, told before anything is loaded, in the app process: no torch."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from glmui import i18n
from glmui.engine.model_folder import describe
from glmui.glm.config import read_config
from glmui.memory import sizing
from glmui.memory.fitting import context_that_fits, layers_that_fit, lighter, request_of, room, slow_context
from glmui.memory.free import free_on, free_ram
from glmui.memory.model_size import CPU, ModelSize
from glmui.memory.plan import Plan, plan, program_bytes
from glmui.memory.plan_request import CUDA_CONTEXT, Machine, PlanRequest
from glmui.memory.pretended import pretended
from glmui.memory.visible import PART, held_by, visible
from glmui.meter import Reading
from glmui.types import EngineInfo, EngineSpec

Say = Callable[..., str]

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


def forecast(spec: EngineSpec, reading: Reading, engine: EngineInfo | None = None) -> Forecast | None:
    """What becomes of `spec` with the memory of `reading`; None for a model or a device that no plan knows.

    engine: of whose process `reading` tells, where one runs: what it holds counts as free. A few
    milliseconds: what a slider would bring about is asked with replace(spec, layers_on_gpu=N).
    Raises ModelError for the folder, InvalidInput("device_missing") for the device.
    """
    known = pretended(spec) or _known(spec, reading, engine)
    if known is None:
        return None
    return foreseen(spec, *known)


def foreseen(spec: EngineSpec, size: ModelSize, machine: Machine) -> Forecast | None:
    """The same for a model of that size and a machine. Raises InvalidInput("device_missing")."""
    machine = replace(machine, cards=tuple(min(free, spec.vram_cap or free) for free in machine.cards))
    if not machine.cards and spec.device != CPU and (spec.device == "mps" or _has_other_card()):
        return None
    found = plan(size, machine, request_of(spec))
    return Forecast(size, machine, found, room(spec, size, found))


def _known(spec: EngineSpec, reading: Reading, engine: EngineInfo | None) -> tuple[ModelSize, Machine] | None:
    machine = machine_of(reading, engine)
    if machine is None or (size := size_of(spec)) is None:
        return None
    return size, machine


def size_of(spec: EngineSpec) -> ModelSize | None:
    """The size of a spec's model and its extras, None where it is no ChatGLM. Raises ModelError."""
    if describe(spec.folder).family != "chatglm":
        return None
    return sizing.size_of(spec, read_config(Path(spec.folder), spec.chatglm_family))


def machine_of(
    reading: Reading, engine: EngineInfo | None = None, environ: Mapping[str, str] = os.environ
) -> Machine | None:
    """What is free here, or would be without that engine; None where the RAM cannot be read, or torch sees a
    part of a card (MIG)."""
    ram, cards = free_ram(reading, engine is not None), visible(reading.cards, environ).values()
    if ram is None or PART in cards:
        return None
    held = held_by(reading.cards, engine, environ)
    return Machine(tuple(free_on(card, card in held) for card in cards), ram)


def _has_other_card() -> bool:
    """Whether there may be a card that torch can use and NVML knows nothing of: Apple's or AMD's."""
    is_apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return is_apple or _ROCM.exists()


def explain(found: Plan, size: ModelSize, language: str) -> Explanation:
    """A plan in words: for the command line, the doctor and the page."""
    advised = advice(found, size, language)
    notes = (*notes_of(found, language), *([advised] if advised else []))
    return Explanation(sentence(found, size, language), rows_of(found, size, language), notes, advised)


def sentence(found: Plan, size: ModelSize, language: str) -> str:
    """Where the layers go."""
    on_card = found.layers_on_card
    count = {"on_card": on_card, "on_cpu": size.layers - on_card, "layers": size.layers}
    return _sayer(language)(found.reason, **count, context=f"{found.request.context:,}")


def rows_of(found: Plan, size: ModelSize, language: str) -> tuple[Row, ...]:
    """What is where."""
    return tuple(_rows(found, size, _sayer(language)))


def notes_of(found: Plan, language: str) -> tuple[str, ...]:
    """How full each device gets, and what is missing."""
    return tuple(_notes(found, _sayer(language)))


def _sayer(language: str) -> Say:
    return lambda key, **values: i18n.text(language, f"plan.{key}", **values)


def _rows(found: Plan, size: ModelSize, say: Say) -> Iterator[Row]:
    asked = found.request
    apart = size.embedding_apart(asked.head_bits)
    if apart:
        yield Row(say("embedding"), found.embedding, 0)
    yield Row(say("head" if apart else "table"), found.head, size.head_bytes(found.head, asked.head_bits))
    for device, group in groupby(enumerate(found.layers), key=lambda pair: pair[1]):
        numbers = [number for number, _ in group]
        first, last = numbers[0], numbers[-1]
        cache = len(numbers) * size.cache_bytes(device, asked.context, asked.kv_cache)
        taken = size.layers_bytes(device, range(first, last + 1)) + cache
        yield Row(say("layers" if last > first else "layer", first=first, last=last), device, taken)
    for device in dict.fromkeys(found.layers):
        scratch = size.scratch_bytes(device, asked.context, asked.kv_cache, asked.prefill_piece)
        yield Row(say("scratch", piece=asked.prefill_piece), device, scratch)
    yield Row(say("program"), CPU, program_bytes(found.head))


def _notes(found: Plan, say: Say) -> Iterator[str]:
    for device, need in found.on.items():
        key = "card" if device != CPU else "ram_mapped" if found.mapped else "ram"
        yield say(key, device=device, gb=_gb(need), cuda=CUDA_CONTEXT / 1e9, mapped=_gb(found.mapped))
    for device, missing in found.short.items():
        yield say("short_ram" if device == CPU else "short", device=device, gb=_gb(missing))


def advice(found: Plan, size: ModelSize, language: str) -> str:
    """What could be done where something is short, or layers could be on a card and are not; else ""."""
    say = _sayer(language)
    if not found.short:
        less = lighter(size, found)
        return say(_sacrifice(less, found.request), layers=size.layers) if less else ""
    if fits := context_that_fits(size, found.machine, found.request):
        return say("slow_or_shorter" if found.slow else "shorter_context", context=fits)
    if most := layers_that_fit(size, found):
        return say("fewer_layers", most=most, layers=size.layers)
    if found.slow:
        return say("from_disk")
    if slow := slow_context(size, found):
        return say("slow_if_shorter", context=slow)
    return say("smaller_model" if size.bits > 4 else "close_programs")


def _sacrifice(less: PlanRequest, asked: PlanRequest) -> str:
    """In which of the two a lighter request differs."""
    if less.kv_cache == asked.kv_cache:
        return "lighter_head"
    return "lighter_cache" if less.head_bits == asked.head_bits else "lighter_both"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f}"
