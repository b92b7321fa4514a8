"""Where a model runs and in what precision: decided here, once, with the reason.

A reason is a key of the locales' "reasons"; EngineInfo's own fields fill its placeholders.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from glmui.errors import InvalidInput
from glmui.memory.plan import CUDA_CONTEXT
from glmui.memory.trouble import out_of_memory_on

if TYPE_CHECKING:
    import torch

_SMALL = 1_000_000_000  # bytes of weights up to which float32 on a CPU costs nobody anything
_OPENED = CUDA_CONTEXT // 2  # bytes that a context takes before anything is computed in it
_ROOM = 0.7  # part of the free memory that float32 weights may take


@dataclass(frozen=True, slots=True)
class Placement:
    """device: "cpu", "cuda:0", "mps". dtype: "float32", "bfloat16", "float16"."""

    device: str
    dtype: str
    reason: str

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


def count_physical_cores() -> int:
    """Cores this process may use, hyper-threads not counted; at least 1. Imports no torch."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(cores, allowed))


def available_devices() -> list[str]:
    """What torch can use here, best first: "cuda:0" …, "mps", "cpu"."""
    import torch

    devices = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [*devices, "cpu"]


def free_on_cards(wish: str) -> tuple[int, ...]:
    """Bytes of each card that torch can use and others leave free, () without one, and for "cpu".

    wish: a device. To ask opens a CUDA context, which takes memory of the card: so only those that it may
    mean are asked, and the others count as full.
    """
    import torch

    count = torch.cuda.device_count() if wish != "cpu" and torch.cuda.is_available() else 0
    asked = {"cuda": "cuda:0"}.get(wish, wish)
    return tuple(_free_on(card) if asked in ("auto", "mixed", f"cuda:{card}") else 0 for card in range(count))


def _free_on(card: int) -> int:
    """The context is ours: plans count it, as the app does before it is there. 0 where it does not fit."""
    import torch

    try:
        free, total = torch.cuda.mem_get_info(card)
    except RuntimeError as error:
        if not out_of_memory_on(error, f"cuda:{card}"):
            raise
        return 0
    return min(total, free + _OPENED)


def resolve_device(wish: str, available: list[str] | None = None) -> str:
    """The torch device for "auto", "cpu", "cuda", "cuda:N" or "mps".

    Raises InvalidInput("device_missing") with what there is instead.
    """
    if wish == "cpu":
        return wish  # without a look at any card
    there = available_devices() if available is None else available
    if wish == "auto":
        return there[0]
    device = "cuda:0" if wish == "cuda" else wish
    if device not in there:
        raise InvalidInput("device_missing", device=wish, available=", ".join(there))
    return device


def place(wish: str, stored_dtype: str, weight_bytes: int) -> Placement:
    """Device and precision of a transformers model, its weights taking `weight_bytes` in `stored_dtype`.

    Raises InvalidInput: "device_missing", or "device_mixed" (mixed is for the ChatGLM models).
    """
    if wish == "mixed":
        raise InvalidInput("device_mixed")
    device = resolve_device(wish)
    if device != "cpu":
        return Placement(device, *_precision_on_card(device, stored_dtype))
    return Placement(device, *_precision_on_cpu(stored_dtype, weight_bytes))


def _precision_on_card(device: str, stored: str) -> tuple[str, str]:
    import torch

    if stored != "float16" and device.startswith("cuda"):
        with torch.cuda.device(device):  # of two cards one may be older
            if torch.cuda.is_bf16_supported(False):
                return "bfloat16", "reasons.card_bfloat16"
    return "float16", "reasons.card_float16"


def _precision_on_cpu(stored: str, weight_bytes: int) -> tuple[str, str]:
    """float32 is exact and everywhere well supported; large weights are read twice as fast in bfloat16."""
    full = weight_bytes if stored == "float32" else 2 * weight_bytes
    if full > _ROOM * psutil.virtual_memory().available:
        return "bfloat16", "reasons.cpu_bfloat16_memory"
    if stored == "bfloat16" and weight_bytes > _SMALL and _fast_in_bfloat16():
        return "bfloat16", "reasons.cpu_bfloat16_fast"
    return "float32", "reasons.cpu_float32"


def _fast_in_bfloat16() -> bool:
    import torch

    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
