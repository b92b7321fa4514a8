"""What a transformers model computes in: as exact as the machine can afford.

A reason is a key of the locales' "reasons"; EngineInfo's own fields fill its placeholders.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from glmui.engine.device import resolve_device
from glmui.errors import InvalidInput

_SMALL = 1_000_000_000  # bytes of weights up to which float32 on a CPU costs nobody anything
_ROOM = 0.7  # part of the free memory that float32 weights may take


@dataclass(frozen=True, slots=True)
class Precision:
    """Of a model on a device. device: "cpu", "cuda:0", "mps". dtype: "float32", "bfloat16", "float16"."""

    device: str
    dtype: str
    reason: str

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


def precision_of(wish: str, stored_dtype: str, weight_bytes: int) -> Precision:
    """Device and precision of a transformers model, its weights taking `weight_bytes` in `stored_dtype`.

    Raises InvalidInput: "device_missing", or "device_mixed" (mixed is for the ChatGLM models).
    """
    if wish == "mixed":
        raise InvalidInput("device_mixed")
    device = resolve_device(wish)
    if device != "cpu":
        return Precision(device, *_precision_on_card(device, stored_dtype))
    return Precision(device, *_precision_on_cpu(stored_dtype, weight_bytes))


def _precision_on_card(device: str, stored: str) -> tuple[str, str]:
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
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
