"""Where the parts of a model would go, on this computer or on one that is only imagined."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import psutil

from glmui import i18n
from glmui.errors import InvalidInput, NotFound
from glmui.glm.config import AnyConfig, read_config
from glmui.hub import installed
from glmui.memory.fitting import longest_context, most_tokens, request_of
from glmui.memory.forecast import Row, explain, machine_of
from glmui.memory.model_size import CPU, ModelSize
from glmui.memory.plan import Plan, plan
from glmui.memory.plan_request import CUDA_CONTEXT, GIB, Machine
from glmui.memory.published import SHAPES
from glmui.memory.sizing import size_of
from glmui.meter import Meter
from glmui.settings import Settings, spec_of
from glmui.tools.aligned import aligned

_MOST_GIB = 65536


@dataclass(frozen=True)
class Wish:
    """What the command line asked for, beside the settings. vram, ram: GiB of an imagined machine; empty and
    None for this one."""

    vram: tuple[float, ...] = ()
    ram: float | None = None
    as_json: bool = False


def run(wish: Wish, settings: Settings, language: str) -> int:
    """Print the plan of the settings' model; 0 where it fits, 1 where something is short."""
    config, folder = _config(settings.model, settings)
    spec = spec_of(settings, settings.model, folder)
    size = size_of(spec, config)
    made = plan(size, _machine(wish), request_of(spec))
    tokens = longest_context(size, made, most_tokens(spec, size))
    told = as_json(made, size, tokens, language) if wish.as_json else lines(made, size, tokens, language)
    print(told)
    return 1 if made.short else 0


def _config(name: str, settings: Settings) -> tuple[AnyConfig, str]:
    """A model's config and its folder; where there is none, a published one of that name, and ""."""
    with contextlib.suppress(NotFound):
        if (folder := installed.resolve(name, settings.data_dir)).is_dir():  # the scripted engine has none
            return read_config(folder, settings.chatglm_family), str(folder)
    if name in SHAPES:
        return SHAPES[name], ""
    raise InvalidInput("plan_model_unknown", model=name, names=", ".join(SHAPES))


def _machine(wish: Wish) -> Machine:
    """The imagined machine; what is not said of it is taken from this one."""
    for name, value in (("--ram", wish.ram), *(("--vram", card) for card in wish.vram)):
        if value is not None and not 0 <= value <= _MOST_GIB:  # NaN is neither
            raise InvalidInput("out_of_bounds", name=name, value=value, low=0, high=_MOST_GIB)
    here = Machine((), 0) if wish.vram and wish.ram is not None else _this_machine()
    cards = tuple(int(card * GIB) for card in wish.vram if card) if wish.vram else here.cards
    return Machine(cards, here.ram if wish.ram is None else int(wish.ram * GIB))


def _this_machine() -> Machine:
    with contextlib.closing(Meter()) as meter:
        return machine_of(meter.read(None)) or Machine((), psutil.virtual_memory().available)


def as_json(made: Plan, size: ModelSize, tokens: int, language: str) -> str:
    """GB = 10^9 bytes, MB = 10^6."""
    asked = made.request
    head = size.head_bytes(made.head, asked.head_bits)

    def layer(number: int, device: str) -> dict[str, Any]:
        taken = size.layer_bytes(device, number) + size.cache_bytes(device, asked.context, asked.kv_cache)
        return {"layer": number, "device": device, "mb": _mb(taken)}

    return json.dumps(
        {
            "predicted_vram_gb": _gb(made.vram),
            "predicted_ram_gb": _gb(made.ram),
            "mapped_ram_gb": _gb(made.mapped),
            "vram_gb": {device: _gb(n) for device, n in made.on.items() if device != CPU},
            "cuda_context_gb": CUDA_CONTEXT / 1e9 if made.layers_on_card else 0,
            "layers_on_gpu": made.layers_on_card,
            "layers": list(starmap(layer, enumerate(made.layers))),
            "embedding": {"device": made.embedding},
            "head": {"device": made.head, "mb": _mb(head)},
            "prefill_piece": made.piece,
            "context": asked.context,
            "room": tokens,
            "short_gb": {device: _gb(n) for device, n in made.short.items()},
            "reason": made.reason,
            "explanation": explain(made, size, language).sentence,
        },
        ensure_ascii=False,
    )


def _gb(count: int) -> float:
    return round(count / 1e9, 3)


def _mb(count: int) -> float:
    return round(count / 1e6, 1)


def lines(made: Plan, size: ModelSize, tokens: int, language: str) -> str:
    """A sentence, then what is where, then how full each device gets and what could be done."""
    told = explain(made, size, language)
    longest = [i18n.text(language, "plan.room", room=f"{tokens:,}")] if tokens else []
    return "\n".join([told.sentence, "", *table(told.rows), "", *longest, *told.notes])


def table(rows: Iterable[Row]) -> list[str]:
    """What is where, a line for each part."""
    return aligned((row.part, row.device, f"{row.size / 1e6:,.0f} MB") for row in rows)
