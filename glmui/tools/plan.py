"""Where the parts of a model would go, on this computer or on one that is only imagined."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import psutil

from glmui import i18n
from glmui.engine.plan import CPU, CUDA_CONTEXT, GIB, Machine, ModelSize, Plan, context_that_fits, plan
from glmui.engine.plan import Wish as PlanWish
from glmui.engine.published import SHAPES
from glmui.errors import InvalidInput, NotFound
from glmui.glm.config import AnyConfig, read_config
from glmui.hub import installed
from glmui.meter import Meter
from glmui.settings import Settings
from glmui.tools.aligned import aligned
from glmui.types import BITS

_MOST_GIB = 65536


@dataclass(frozen=True)
class Wish:
    """What the command line asked for. vram, ram: GiB of an imagined machine; empty and None for this one."""

    model: str
    vram: tuple[float, ...] = ()
    ram: float | None = None
    context: int | None = None
    layers_on_card: int | None = None
    quantize: str = "none"
    as_json: bool = False


def run(wish: Wish, settings: Settings, language: str) -> int:
    """Print the plan; 0 where it fits, 1 where something is short."""
    config = _config(wish.model, settings)
    size = ModelSize.of(config, BITS[wish.quantize])
    machine = _machine(wish)
    asked = PlanWish(
        settings.device,
        min(2048, config.context_length) if wish.context is None else wish.context,
        wish.layers_on_card,
    )
    made = plan(size, machine, asked)
    if wish.as_json:
        print(json.dumps(as_json(made, size, asked.context)))
    else:
        print("\n".join(lines(made, size, machine, asked, language)))
    return 1 if made.short else 0


def _config(name: str, settings: Settings) -> AnyConfig:
    """A model's config: of its folder, or where there is none, of a published one by that name."""
    try:
        folder = installed.resolve(name, settings.data_dir)
    except NotFound:
        if name in SHAPES:
            return SHAPES[name]
        raise InvalidInput("plan_model_unknown", model=name, names=", ".join(SHAPES)) from None
    return read_config(folder, settings.chatglm_family)


def _machine(wish: Wish) -> Machine:
    """The imagined machine; what is not said of it is taken from this one."""
    for name, value in (("--ram", wish.ram), *(("--vram", card) for card in wish.vram)):
        if value is not None and not 0 <= value <= _MOST_GIB:  # NaN is neither
            raise InvalidInput("out_of_bounds", name=name, value=value, low=0, high=_MOST_GIB)
    cards = tuple(int(card * GIB) for card in wish.vram if card) if wish.vram else _cards_here()
    ram = psutil.virtual_memory().available if wish.ram is None else int(wish.ram * GIB)
    return Machine(cards, ram)


def _cards_here() -> tuple[int, ...]:
    """Free bytes of each card of this computer."""
    with contextlib.closing(Meter()) as meter:
        cards = meter.read(None).cards
    return tuple(card.total - card.used for card in cards if card.total is not None and card.used is not None)


def as_json(made: Plan, size: ModelSize, context: int) -> dict[str, Any]:
    """GB = 10^9 bytes, MB = 10^6."""
    return {
        "predicted_vram_gb": round(made.vram / 1e9, 3),
        "predicted_ram_gb": round(made.ram / 1e9, 3),
        "vram_gb": {device: round(n / 1e9, 3) for device, n in made.on.items() if device != CPU},
        "cuda_context_gb": CUDA_CONTEXT / 1e9 if made.layers_on_card else 0,
        "layers_on_gpu": made.layers_on_card,
        "layers": [
            {"layer": n, "device": device, "mb": round(size.layer_bytes(device, context) / 1e6, 1)}
            for n, device in enumerate(made.layers)
        ],
        "embedding_and_head": {"device": made.table, "mb": round(size.table_bytes() / 1e6, 1)},
        "short_gb": {device: round(n / 1e9, 3) for device, n in made.short.items()},
        "reason": made.reason,
    }


def lines(made: Plan, size: ModelSize, machine: Machine, asked: PlanWish, language: str) -> list[str]:
    """A sentence, then what is where, then what is short and what could be done."""

    def say(key: str, **values: Any) -> str:
        return i18n.text(language, f"plan.{key}", **values)

    on_card = made.layers_on_card
    count = {"on_card": on_card, "on_cpu": size.layers - on_card, "layers": size.layers}
    rows = [(say("table"), made.table, f"{size.table_bytes() / 1e6:,.0f} MB")]
    for device, group in groupby(enumerate(made.layers), key=lambda pair: pair[1]):
        numbers = [n for n, _ in group]
        mb = len(numbers) * size.layer_bytes(device, asked.context) / 1e6
        rows.append((say("layers", first=numbers[0], last=numbers[-1]), device, f"{mb:,.0f} MB"))
    told = [say(made.reason, **count, context=asked.context), "", *aligned(rows), ""]
    for device, need in made.on.items():
        told.append(
            say(
                "ram" if device == CPU else "card",
                device=device,
                gb=f"{need / 1e9:.2f}",
                cuda=CUDA_CONTEXT / 1e9,
            )
        )
    for device, missing in made.short.items():
        told.append(say("short", device=device.upper(), gb=f"{missing / 1e9:.2f}"))
    if made.short:
        fits = context_that_fits(size, machine, asked)
        told.append(say("shorter_context", context=fits) if fits else say("smaller_model"))
    return told
