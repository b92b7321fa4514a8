"""The machine that the scripted engine makes believe it runs on, with ChatGLM-6B-INT4 in its memory.

The model "echo vram=6 ram=16" plans as ChatGLM-6B-INT4 does where 6 and 16 GiB are free, so that whatever is
said or offered about memory can be seen and tested without a card.
"""

from __future__ import annotations

import re

from glmui.memory.model_size import ModelSize
from glmui.memory.plan_request import GIB, Machine
from glmui.memory.published import SHAPES
from glmui.types import EngineSpec

SHAPE = SHAPES["chatglm-6b-int4"]
RAM = 16 * GIB  # where none is named

_SIZE = re.compile(r"(vram|ram)=(\d+(?:\.\d+)?)")


def pretended(spec: EngineSpec) -> tuple[ModelSize, Machine] | None:
    """The model's size and what is free, or None where no machine is pretended. vram may be named often."""
    named = [
        (found[1], int(float(found[2]) * GIB)) for found in map(_SIZE.fullmatch, spec.model.split()) if found
    ]
    if not named:
        return None
    cards = tuple(size for name, size in named if name == "vram" and size)
    return ModelSize.of(SHAPE), Machine(cards, dict(named).get("ram", RAM))
