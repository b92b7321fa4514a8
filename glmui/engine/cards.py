"""A ChatGLM on cards: what of their memory it may take, its output head, the kernels that compute it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from glmui.engine.card_step import CardStep, can_step, is_computable
from glmui.glm.checkpoint import AnyModel
from glmui.memory.model_size import CPU
from glmui.memory.plan import Plan
from glmui.memory.plan_request import CUDA_CONTEXT, budget
from glmui.quant.kernels import cuda
from glmui.quant.kernels.cuda.native import CardKernels
from glmui.quant.on_card import head_in_int8, use_card_kernels
from glmui.types import EngineInfo, Progress

_LOST = CUDA_CONTEXT // 2  # bytes that torch's allocator may take and cannot use
_PATIENCE = 0.5  # seconds: kernels that are there already are loaded sooner, and nothing need be said


@dataclass(frozen=True, slots=True)
class Cards:
    """What became of the kernels on each card that a model is to use."""

    loaded: Mapping[torch.device, cuda.Loaded]

    @property
    def kernels(self) -> dict[torch.device, CardKernels]:
        """Those that may be used."""
        found = {device: loaded.kernels for device, loaded in self.loaded.items()}
        return {device: kernels for device, kernels in found.items() if kernels is not None}

    @property
    def names(self) -> list[str]:
        """Of the kernels in use, such as "sm_86"; each once."""
        return list(dict.fromkeys(kernels.name for kernels in self.kernels.values()))

    @property
    def reason(self) -> str:
        """Why torch does what a card's kernels might: a key of the locales' "reasons", or ""."""
        reasons = (loaded.reason for loaded in self.loaded.values() if not (loaded.kernels and loaded.block))
        return next(reasons, "")


def open_cards(
    devices: Iterable[str], folder: Path, on_progress: Callable[[Progress], None] = lambda progress: None
) -> Cards:
    """The kernels for those of the devices that are NVIDIA's cards, from the cache `folder`; built where they
    are not there, which takes some seconds."""
    names = sorted({device for device in devices if device.startswith("cuda")})
    with _told_when_slow(on_progress, Progress("compiling")):
        return Cards({torch.device(name): cuda.load(name, folder) for name in names})


@contextmanager
def _told_when_slow(on_progress: Callable[[Progress], None], progress: Progress) -> Iterator[None]:
    timer = threading.Timer(_PATIENCE, on_progress, [progress])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def limit_memory(plan: Plan) -> None:
    """Let torch take no more of each card than the plan may.

    It raises OutOfMemoryError then, which can be dealt with. Windows would give it RAM in place of more, and
    everything would go on ten times slower.
    """
    for name in plan.on:
        if name != CPU:
            total = torch.cuda.get_device_properties(name).total_memory
            most = (budget(plan.machine, plan.request, name) + _LOST) / total
            torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, most)), name)


def settle(model: AnyModel, cards: Cards) -> None:
    """Give a loaded model the kernels, and a head in 8 bits where its table stayed in RAM for that."""
    head = model.get_submodule(model.HEAD)
    if isinstance(head, nn.Linear) and head.weight.device.type == "cpu" and model.device.type != "cpu":
        model.set_submodule(model.HEAD, head_in_int8(head, model.device))
    use_card_kernels(model, cards.kernels)


def step_of(model: AnyModel, cards: Cards) -> CardStep | None:
    """What computes a reply's tokens where the kernels can do all of the model; None where it does itself."""
    loaded = cards.loaded.get(model.device)
    if loaded is None or loaded.block is None or not can_step(model, loaded.block):
        return None
    return CardStep(model, loaded.block)


def told(info: EngineInfo, cards: Cards, model: AnyModel, step: CardStep | None) -> EngineInfo:
    """The info with what became of the kernels on cards. The gravest reason comes first."""
    kernel = ", ".join([*cards.names, *([info.kernel] if info.kernel else [])])
    reason = cards.reason or (step.reason if step else _without_step(model, cards)) or info.reason
    return replace(info, kernel=kernel, reason=reason)


def _without_step(model: AnyModel, cards: Cards) -> str:
    """Why there is no CardStep, where that is not to be seen from where the layers are."""
    loaded = cards.loaded.get(model.device)
    is_for_the_cache = loaded and loaded.block and is_computable(model, loaded.block)
    return "reasons.card_kernels_cache" if is_for_the_cache else ""
