"""Where a ChatGLM goes on this machine: the plan (plan.py) with what is free now, as devices and dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import psutil
import torch
from torch import nn

from glmui import i18n
from glmui.engine import device as devices
from glmui.glm.checkpoint import AnyModel, Place, everything_on
from glmui.glm.config import AnyConfig
from glmui.memory.fitting import request_of, room
from glmui.memory.model_size import CPU
from glmui.memory.plan import Plan, plan
from glmui.memory.plan_request import Machine
from glmui.memory.sizing import size_of
from glmui.quant.fast import KernelLinear
from glmui.types import PIECE, EngineSpec


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model goes. device: as EngineInfo tells it. reason: a key of the locales' "reasons".

    plan: what it follows, None on a device that no plan is made for ("mps").
    room: the most tokens of prompt and reply that there is memory for, 0 where that is not known.
    piece: tokens of a prompt to read at a time, for the model's `piece`.
    """

    place: Place
    device: str
    dtype: torch.dtype
    reason: str
    plan: Plan | None = None
    room: int = 0
    piece: int = PIECE

    @property
    def holds_all(self) -> bool:
        """Whether RAM has room for all that goes there now, were no page of it a file's."""
        return self.plan is None or CPU not in self.plan.short

    @property
    def layers(self) -> tuple[str, ...]:
        """The device of each layer, for EngineInfo; () where no plan was made."""
        return self.plan.layers if self.plan else ()


def placement(spec: EngineSpec, config: AnyConfig, dtype: torch.dtype | None = None) -> Placement:
    """Decide device and dtype of the model that `config` tells of, as `spec` wishes.

    The one call for open_chatglm, the Python API and transformers' auto classes: who has no spec makes one,
    with an empty model and folder, of the device, `quantize` and whatever else is known.
    With head_bits=8 embedding and head are placed in RAM, as they lie in their files; the quantised head is
    to go to `plan.head`.
    dtype: what is computed in; None is float32 on a CPU, where it is exact, and float16 on a card.
    Raises InvalidInput("device_missing").
    """
    cards = devices.free_on_cards(spec.device)
    if not cards and spec.device not in (CPU, "mixed"):
        device = devices.resolve_device(spec.device)  # "mps", or else it raises what is missing
        if device != CPU:
            place = everything_on(device, dtype or torch.float16)
            piece = spec.prefill_piece or PIECE
            return Placement(
                place, device, dtype or torch.float16, _reason(device), room=spec.context_most, piece=piece
            )
    computed = dtype or torch.float16
    size = size_of(spec, config, computed.itemsize)
    capped = tuple(min(free, spec.vram_cap or free) for free in cards)
    found = plan(size, Machine(capped, psutil.virtual_memory().available), request_of(spec))
    tokens = room(spec, size, found)
    if {*found.layers} == {CPU}:
        computed = dtype or torch.float32
    place = _followed(found, computed)
    device = found.head if len({*found.layers}) == 1 else "mixed"
    return Placement(place, device, computed, _reason(device), found, tokens, found.piece)


def _reason(device: str) -> str:
    return f"reasons.{ {CPU: 'chatglm_cpu', 'mixed': 'chatglm_mixed'}.get(device, 'card_float16') }"


def _followed(found: Plan, dtype: torch.dtype) -> Place:
    """Each part where the plan has it; beside a card, what is on the CPU computes in float32.

    The head comes from where the embedding is: where they are apart, it is quantised on its way to the card.
    """
    has_card = found.head != CPU

    def place(name: str) -> tuple[torch.device, torch.dtype]:
        _, _, rest = name.partition(".layers.")
        if rest:
            device = found.layers[int(rest.partition(".")[0])]
        else:
            device = found.head if "layernorm" in name else found.embedding
        return torch.device(device), torch.float32 if has_card and device == CPU else dtype

    return place


class DeviceMap(dict[str, str]):
    """{part: device}. As text: a sentence, and a table of neighbours on one device with their MB."""

    def __init__(self, parts: Mapping[str, tuple[str, int]]) -> None:
        """parts: device and bytes of each."""
        super().__init__({name: device for name, (device, _) in parts.items()})
        self._parts = parts

    def __str__(self) -> str:
        blocks = [device for name, device in self.items() if ".layers." in name]
        on_card = sum(device != CPU for device in blocks)
        counts = {"layers": len(blocks), "on_card": on_card, "on_cpu": len(blocks) - on_card}
        rows = list(self._rows())
        width = max((len(span) for span, _, _ in rows), default=0)
        table = [f"{span:<{width}}  {device:<6}  {size:>9}" for span, device, size in rows]
        return "\n".join([i18n.text(i18n.of_terminal(), "plan.map", **counts), "", *table])

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        for device, group in groupby(self._parts.items(), key=lambda part: part[1][0]):
            names, places = zip(*group, strict=True)
            span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
            yield span, device, f"{sum(size for _, size in places) / 1e6:,.0f} MB"


def device_map(model: AnyModel) -> DeviceMap:
    """The device of the embedding, each block, the last norm and the output head."""
    parts = dict(model.parts())
    parts.setdefault(model.HEAD, model.get_submodule(model.HEAD))
    return DeviceMap({name: _place_of(part) for name, part in parts.items()})


def _place_of(part: nn.Module) -> tuple[str, int]:
    """Where a part is, and its bytes; kernels keep weights that are no parameters."""
    packed = [module.packed for module in part.modules() if isinstance(module, KernelLinear)]
    tensors = [*part.parameters(), *(each for kept in packed for each in (kept.weight, kept.scale))]
    return str(tensors[0].device), sum(tensor.nbytes for tensor in tensors)


def cache_dtype(spec: EngineSpec) -> torch.dtype | None:
    """What keys and values are kept in; None for what a layer computes in. That is what "fp32" means, too:
    float32 on a CPU, and on a card float16, in which they were computed."""
    if spec.kv_cache == "auto":
        return None if spec.cpu_precision == "exact" else torch.float16
    kinds = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
    return kinds[spec.kv_cache]
