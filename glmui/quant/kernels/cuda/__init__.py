"""The kernels of an NVIDIA card: compiled on the user's machine, checked there against torch, then used.

`load` is all a caller needs. Where no kernel can be used, torch's own path stays, and the reason is told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from glmui.memory.trouble import out_of_memory_on
from glmui.quant.kernels.cuda import driver
from glmui.quant.kernels.cuda.block import BlockKernels
from glmui.quant.kernels.cuda.check import block_is_right, linear_is_right
from glmui.quant.kernels.cuda.compile import Compiler, NotCompiled, digest, find, images
from glmui.quant.kernels.cuda.driver import Card, DriverError, Module
from glmui.quant.kernels.cuda.native import CardKernels

__all__ = ["BlockKernels", "CardKernels", "Loaded", "folder", "load", "load_on"]

_log = logging.getLogger(__name__)
_OLDEST = (7, 5)
_WITH_BFLOAT16 = (8, 0)
_TRIES = 2  # a check that never ended so often was ended by the kernels, not by chance

Open = Callable[[Sequence[bytes], Card], Module]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of a card's kernels.

    kernels: for linear layers; None when torch must do without. block: for what stands between them, None
    where torch does that. reason: a key of the locales' "reasons", in which {kernel} is the kernels' name.
    """

    kernels: CardKernels | None
    block: BlockKernels | None
    reason: str

    @property
    def name(self) -> str:
        """What the kernels in use are made for, such as "sm_86", or "torch"."""
        return self.kernels.name if self.kernels else "torch"


def folder(cache: Path) -> Path:
    """Where in the folder `cache` the kernels are kept; it may be removed at any time."""
    return cache / "cuda"


def load(device: str, cache: Path) -> Loaded:
    """The kernels for a card, "cuda" or "cuda:1", compiled into the folder `cache` where they are missing.

    Compiling takes some seconds, all else milliseconds. Never raises for anything the machine lacks.
    """
    if torch.version.hip or torch.device(device).type != "cuda":
        return _without("other_card")
    try:
        return load_on(Card(device), cache)
    except (RuntimeError, AssertionError) as error:  # no card there, or torch was built for none
        _log.debug("%s: %s", device, error)
        return _without("not_loaded")


def load_on(
    card: Card,
    cache: Path,
    compiler: Callable[[], Compiler] = lambda: find(torch.version.cuda),
    open_module: Open = driver.load,
) -> Loaded:
    """The same for a card that is there."""
    if card.capability < _OLDEST:
        return _without("old_card")
    diary = folder(cache) / f"{card.name}-{digest()}.trying"
    try:
        compiled = images(folder(cache), card.capability, compiler(), list(_types(card)))
        return _noted(diary, lambda: _tried(card, lambda: open_module(compiled, card)))
    except NotCompiled as error:
        return Loaded(None, None, error.reason)
    except OSError as error:
        _log.debug("kernels: %s", error)
        return _without("no_room")


def _types(card: Card) -> dict[str, torch.dtype]:
    """What the card computes in, by the endings of kernels' names."""
    with_bfloat16 = card.capability >= _WITH_BFLOAT16
    return {"half": torch.float16, **({"bf16": torch.bfloat16} if with_bfloat16 else {})}


class _Fault(Exception):
    """A kernel ended with a fault. For this process nothing on that card works any more, in torch neither."""


def _noted(diary: Path, check: Callable[[], Loaded]) -> Loaded:
    """What comes of a check, for which a letter stands in `diary` until it is over: it may end the process.

    After a fault, or too many such ends, there is no other check as long as the kernels stay what they are.
    """
    diary.parent.mkdir(parents=True, exist_ok=True)
    if diary.is_file() and diary.stat().st_size >= _TRIES:
        return _without("wrong")
    with diary.open("a", encoding="ascii") as entry:
        entry.write("x")
    try:
        loaded = check()
    except _Fault:
        diary.write_text("x" * _TRIES, "ascii")
        return _without("wrong")
    diary.unlink(missing_ok=True)
    return loaded


def _tried(card: Card, open_module: Callable[[], Module]) -> Loaded:
    """Raises _Fault. Memory that runs out is none: the driver may need some for a kernel's first start."""
    try:
        module = open_module()
    except (DriverError, RuntimeError) as error:  # torch's: the card is full, or held by another process
        _log.debug("kernels: %s", error)
        return _without("not_loaded")
    try:
        return _checked(CardKernels(module, card.name), BlockKernels(module, card.name), card)
    except (DriverError, RuntimeError, ValueError, KeyError, MemoryError) as error:
        _log.debug("kernels: %s", error)
        if out_of_memory_on(error, card.device):
            return _without("not_loaded")
        raise _Fault from error


def _checked(kernels: CardKernels, block: BlockKernels, card: Card) -> Loaded:
    dtypes = _types(card).values()
    if not linear_is_right(kernels, dtypes, card.device):
        return _without("wrong")
    if not block_is_right(block, dtypes, card.device):
        return Loaded(kernels, None, "reasons.card_kernels_part")
    return Loaded(kernels, block, "reasons.card_kernels")


def _without(why: str) -> Loaded:
    return Loaded(None, None, f"reasons.card_kernels_{why}")
