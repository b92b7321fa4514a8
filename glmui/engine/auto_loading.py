"""What AutoModel.from_pretrained(folder, ...) takes, as glm.checkpoint understands it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from glmui.engine.placement import placement
from glmui.glm.checkpoint import AnyModel, Place, everything_on, load_model
from glmui.glm.config import AnyConfig
from glmui.quant.swap import widen_whole
from glmui.types import EngineSpec


def load_as_asked(folder: Path, config: AnyConfig, family: str, asked: Mapping[str, Any]) -> AnyModel:
    """The model in `folder`, as the keyword arguments `asked` wish; see auto_models. Raises ModelError,
    InvalidInput."""
    bits = 4 if asked.get("load_in_4bit") else 8 if asked.get("load_in_8bit") else 0
    dtype = _dtype(asked)
    match asked.get("device_map"):
        case None:
            place = everything_on("cpu", dtype)
        case dict() as by_name:
            place = _placed_by_name(by_name, dtype)
        case device:
            spec = EngineSpec("", str(folder), str(device), quantize=f"int{bits}" if bits else "none")
            place = placement(spec, config, dtype).place
    glm = load_model(folder, place, bits, family=family)
    if asked.get("use_quantization_cache"):
        widen_whole(glm)
    return glm


def _dtype(asked: Mapping[str, Any]) -> torch.dtype | None:
    wish = asked.get("dtype") or asked.get("torch_dtype")
    if isinstance(wish, str):
        return None if wish == "auto" else getattr(torch, wish)
    return wish


def _placed_by_name(device_map: Mapping[str, Any], dtype: torch.dtype | None) -> Place:
    prefixes = sorted(device_map, key=len, reverse=True)  # the most particular one counts

    def place(name: str) -> tuple[torch.device, torch.dtype | None]:
        return torch.device(device_map[next(p for p in prefixes if name.startswith(p))]), dtype

    return place
