"""A model of any size in the memory of one block: each block's weights are there only while it computes.

For looking at many tokens at once (compare, sensitivity), where reading all weights once is nothing beside
the arithmetic. Everything is computed in float32, quantised weights as what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glmui.errors import ModelError
from glmui.glm.cache import KVCache
from glmui.glm.checkpoint import (
    AnyModel,
    assign,
    check_layout,
    empty_model,
    is_finite,
    read_folder,
    swap_quantized,
)
from glmui.glm.config import read_config
from glmui.glm.model import ChatGLMModel
from glmui.quant.mapped import release
from glmui.quant.packing import dequantize_weight, quantize_weight
from glmui.quantizing.folder import EITHER, Bits


class Weights:
    """A folder's weights as float32, one at a time. bits, group_size: quantise these modules first, and give
    what is left of them. Raises ModelError."""

    def __init__(self, folder: Path, bits: Bits | None = None, group_size: int | None = None) -> None:
        self.folder, self.bits, self.group_size = folder, bits or {}, group_size
        self.tensors = read_folder(folder)
        self.config = read_config(folder, EITHER)
        model = empty_model(self.config)
        self.wide = isinstance(model, ChatGLMModel)  # see packing.quantize_weight
        swap_quantized(model, self.tensors)
        check_layout(model, self.tensors, folder)
        if (width := self.bits.get(model.EMBEDDING, 16)) < 16:
            table = f"{model.EMBEDDING}.weight"
            stored, scale = quantize_weight(self.tensors[table].half(), width, group_size)
            self.tensors |= {table: stored, f"{table}_scale": scale}

    def take(self, name: str, columns: int) -> Tensor:
        """The tensor `name`; columns: the width of the matrix it is, which its bytes do not tell."""
        tensor, scale = self.tensors[name], self.tensors.get(f"{name}_scale")
        if scale is not None:
            bits = 8 if tensor.shape[1] == columns else 4
            return dequantize_weight(tensor, scale, bits, columns, torch.float32)
        width = self.bits.get(name.removesuffix(".weight"), 16)
        if width < 16 and name.endswith(".weight"):
            return quantised(tensor, width, self.group_size, self.wide)
        return self.floats(name)

    def floats(self, name: str) -> Tensor:
        """A tensor that is not quantised, as float32."""
        tensor = self.tensors[name]
        if not is_finite(tensor):
            raise ModelError("model_not_finite", folder=self.folder, name=name)
        # A quantised folder keeps its other numbers in float16, whatever its source had.
        return tensor.half().float() if self.bits else tensor.float()

    def let_go(self, name: str) -> None:
        """Give back the mapped memory of `name`."""
        release(self.tensors[name])


def quantised(weight: Tensor, bits: int, group_size: int | None, wide: bool) -> Tensor:
    """What a float matrix [rows, columns] becomes by quantising it as a file stores it; float32."""
    stored, scale = quantize_weight(weight.half(), bits, group_size, wide)
    return dequantize_weight(stored, scale, bits, weight.shape[1], torch.float32)


def stream(
    weights: Weights, device: str = "cpu", on_block: Callable[[float], None] = lambda part: None
) -> AnyModel:
    """The model whose blocks take their weights when they compute, and forget them after.

    The embedding and the output head are kept in the bits they have in the file. on_block: told the part of
    the blocks that is done, 0..1.
    """
    model = empty_model(weights.config)
    swap_quantized(model, {n: t for n, t in weights.tensors.items() if n.startswith(f"{model.EMBEDDING}.")})
    blocks = blocks_of(model)
    inside = {f"{prefix}.{name}" for block, prefix in blocks.items() for name in block.state_dict()}
    for name in model.state_dict().keys() & weights.tensors.keys() - inside:
        as_it_is = name.startswith((f"{model.EMBEDDING}.", f"{model.HEAD}."))
        assign(model, name, (weights.tensors[name] if as_it_is else weights.floats(name)).to(device))
    model.tie()
    total = len(blocks)
    for done, (block, prefix) in enumerate(blocks.items(), start=1):
        _take_when_called(block, prefix, weights, device)
        block.register_forward_hook(lambda *_, done=done: on_block(done / total))
    return model.eval()


def blocks_of(model: AnyModel) -> dict[nn.Module, str]:
    """The model's blocks, in order, with their names."""
    return {part: name for name, part in model.parts() if name.startswith(f"{model.BLOCKS}.")}


def _take_when_called(block: nn.Module, prefix: str, weights: Weights, device: str) -> None:
    # Neither names the block but by its argument: a circle would keep old models and their files open.
    def fill(block: nn.Module, *_: Any) -> None:
        for name, empty in list(block.named_parameters()):
            assign(block, name, weights.take(f"{prefix}.{name}", empty.shape[-1]).to(device))

    def forget(block: nn.Module, *_: Any) -> None:
        for name, parameter in list(block.named_parameters()):
            assign(block, name, torch.empty_like(parameter, device="meta"))
            weights.let_go(f"{prefix}.{name}")

    block.register_forward_pre_hook(fill)
    block.register_forward_hook(forget)


def cache_for(model: AnyModel, length: int) -> KVCache:
    """A cache for one pass over so many tokens. ChatGLM2's is small, and its pieces need all of it."""
    if isinstance(model, ChatGLMModel):
        return OneLayerCache(model.config.num_layers, length)
    return model.new_cache(length)


class OneLayerCache(KVCache):
    """Keeps the keys and values of the newest layer only: where a prompt goes through layer by layer, one
    pass over it needs no others."""

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        self._layers = [room if place == layer else None for place, room in enumerate(self._layers)]
        super().write(layer, start, keys, values)
