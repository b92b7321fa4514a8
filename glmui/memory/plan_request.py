"""What a plan is made for: what is free, and what is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from glmui.errors import InvalidInput
from glmui.memory.model_size import CPU

GIB = 2**30

# What a CUDA context takes beside the tensors: driver, kernels, and what torch's allocator cannot use of
# what it took. Not counted as allocated.
CUDA_CONTEXT = 400_000_000
# Tokens of a long prompt that are worked on at a time. Many are faster on a card, few need less memory; on a
# CPU more than PIECE are no faster, and Stop waits for them.
PIECES = (128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Machine:
    """What is free, in bytes: on each card, and of RAM."""

    cards: tuple[int, ...]
    ram: int


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is asked for, in the words of EngineSpec.

    device: "auto", "cpu", "cuda", "cuda:N" or "mixed". context: tokens that the KV cache must hold.
    layers_on_gpu: how many, None for as many as fit. vram_reserve: bytes of each card to leave to others.
    head_bits: 8 for an output head that is quantised by itself. kv_cache: what keys and values are kept in,
    "fp16", "bf16", "int8", or "auto" and "fp32" for what a layer computes in. prefill_piece: tokens of a
    prompt to read at a time, 0 for the plan's choice. packed: whether weights in the CPU kernels' order are
    kept in files.
    """

    device: str = "auto"
    context: int = 2048
    layers_on_gpu: int | None = None
    vram_reserve: int = 500_000_000
    head_bits: int = 16
    kv_cache: str = "auto"
    prefill_piece: int = 0
    packed: bool = True

    def __post_init__(self) -> None:
        for name, least in (("context", 1), ("layers_on_gpu", 0), ("vram_reserve", 0), ("prefill_piece", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidInput("out_of_bounds", name=name, value=value, low=least, high="")


def budget(machine: Machine, request: PlanRequest, device: str) -> int:
    """Bytes of a device that may be taken; below 0 where others have taken the reserve."""
    if device == CPU:
        return machine.ram
    return machine.cards[int(device.partition(":")[2])] - CUDA_CONTEXT - request.vram_reserve
