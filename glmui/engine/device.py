"""The devices of this machine: which there are, what is free on each, and which of them a wish means."""

from __future__ import annotations

import os

import psutil

from glmui.errors import InvalidInput
from glmui.memory.plan_request import CUDA_CONTEXT
from glmui.memory.trouble import out_of_memory_on

_OPENED = CUDA_CONTEXT // 2  # bytes that a context takes before anything is computed in it


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
