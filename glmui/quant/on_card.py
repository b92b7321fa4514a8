"""A card's kernels as layers of a model: use_card_kernels() swaps them in for the quantised layers there."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmui.quant.kernels.cuda.native import MOST_ROWS, CardKernels
from glmui.quant.linear import QuantizedLinear
from glmui.quant.mapped import release
from glmui.quant.packing import quantize_weight, rows_of

# Bytes on each card to widen weights into, which plans count (memory/model_size.py): half of ChatGLM-6B's
# largest matrix. A large card's many processors are busy with a whole matrix only, so where torch may take as
# much as ROOMY, which no published model with its whole context fills when quantised, there is more.
SCRATCH = 64 << 20
ROOMY = 10 << 30


class Scratch:
    """Memory on one card that all layers there widen their weights into, one after the other. Taken once.

    mine: to be held from the widening until the product that reads it has been started; on the card one
    follows the other, but threads may take turns in between.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.mine = threading.Lock()
        self._memory = torch.empty(nbytes // 2, dtype=torch.float16, device=device)

    def rows(self, columns: int, dtype: torch.dtype) -> Tensor:
        """As many whole rows as there is room for, [rows, columns] in a 16-bit dtype, for writing only."""
        count = self._memory.numel() // columns
        return self._memory[: count * columns].view(dtype).view(count, columns)


class CardLinear(QuantizedLinear):
    """A QuantizedLinear on a card: same tensors, other arithmetic.

    A few rows of x are multiplied by a kernel that reads the weight as it is stored. Of a weight that many
    rows are to meet a slice is widened, multiplied by the card's own matrix product, and forgotten. What
    there are no kernels for, such as float32, is computed as a QuantizedLinear does it.
    """

    def __init__(self, layer: QuantizedLinear, kernels: CardKernels, scratch: Scratch) -> None:
        kept = layer.weight, layer.weight_scale, layer.bias
        super().__init__(layer.in_features, layer.out_features, layer.weight_bit_width, *kept)
        self.weight, self.weight_scale, self.bias = kept  # an output head's may be the embedding's too
        self.whole = layer.whole
        self.kernels, self._scratch = kernels, scratch

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out] in x's dtype."""
        if x.requires_grad or not self.kernels.takes(x.dtype):  # they compute no gradients
            return super().forward(x)
        if x.shape[:-1].numel() > MOST_ROWS:
            return self._in_slices(x)
        return self.kernels.linear(x, self.weight, self.weight_scale, self.weight_bit_width, self.bias)

    def plain(self) -> QuantizedLinear:
        """The layer that this one computes, without kernels."""
        kept = self.weight, self.weight_scale, self.bias
        layer = QuantizedLinear(self.in_features, self.out_features, self.weight_bit_width, *kept)
        layer.weight, layer.weight_scale, layer.bias = kept
        layer.whole = self.whole
        return layer

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLinear:
        """The plain layer's copy: kernels and scratch are no values, and stay with the model they serve."""
        return deepcopy(self.plain(), memo)

    def _in_slices(self, x: Tensor) -> Tensor:
        room = self._scratch.rows(self.in_features, x.dtype)
        if len(room) >= self.out_features:
            with self._scratch.mine:
                return F.linear(x, self._widened(slice(0, self.out_features), room), self.bias)
        flat = x.reshape(-1, self.in_features)
        out = flat.new_empty(len(flat), self.out_features)
        for first in range(0, self.out_features, len(room)):
            rows = slice(first, first + len(room))
            with self._scratch.mine:
                columns = self._widened(rows, room).T
                if self.bias is None:
                    torch.mm(flat, columns, out=out[:, rows])  # straight to its place: no copy
                else:
                    torch.addmm(self.bias[rows], flat, columns, out=out[:, rows])
        return out.view(*x.shape[:-1], self.out_features)

    def _widened(self, rows: slice, room: Tensor) -> Tensor:
        weight = self.weight[rows]
        widened = room[: len(weight)]
        self.kernels.widen(weight, self.weight_scale[rows], self.weight_bit_width, widened)
        return widened


def use_card_kernels(model: nn.Module, kernels: Mapping[torch.device, CardKernels]) -> None:
    """Swap in kernels for the quantised layers on these devices that they can compute."""
    for device, found in kernels.items():
        mine = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, QuantizedLinear) and layer.weight.device == device and is_computable(layer)
        }
        if mine:
            scratch = Scratch(scratch_bytes(*mine.values(), most=scratch_on(device)), device)
        for name, layer in mine.items():
            model.set_submodule(name, CardLinear(layer, found, scratch))


def forget_card_kernels(model: nn.Module) -> None:
    """Undo use_card_kernels, as before layers are moved elsewhere; frees the scratch."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CardLinear):
            model.set_submodule(name, layer.plain())


def scratch_on(device: torch.device) -> int:
    """The most bytes of a card to widen weights into."""
    if device.type != "cuda":
        return SCRATCH
    total = torch.cuda.get_device_properties(device).total_memory
    roomy = total * torch.cuda.get_per_process_memory_fraction(device) >= ROOMY
    return 4 * SCRATCH if roomy else SCRATCH  # no block's matrix is larger, and a head meets few rows


def scratch_bytes(*layers: QuantizedLinear, most: int = SCRATCH) -> int:
    """What these layers need to widen a slice of `most` bytes, or a whole matrix where that is wished for."""
    row = max((2 * layer.in_features for layer in layers), default=0)
    largest = max(map(_widened_bytes, layers), default=0)
    wished = max((_widened_bytes(layer) for layer in layers if layer.whole), default=0)
    return max(min(most, largest), row, wished)


def _widened_bytes(layer: QuantizedLinear) -> int:
    return 2 * layer.in_features * layer.out_features


def cards_of(model: nn.Module) -> set[str]:
    """The cards that hold layers which their kernels could compute."""
    layers = (m for m in model.modules() if isinstance(m, QuantizedLinear) and is_computable(m))
    return {str(layer.weight.device) for layer in layers if layer.weight.device.type == "cuda"}


def is_computable(layer: QuantizedLinear) -> bool:
    """Whether the kernels take such a layer: any shape, with scales as published."""
    return layer.weight_scale.dtype == torch.float16


def head_in_int8(head: nn.Linear, device: torch.device) -> QuantizedLinear:
    """An output head quantised onto a card, block by block, so that it never lies there in 16 bits.

    The table that an embedding shares with it may stay where it is: in a mapped file it takes no memory.
    """
    rows, columns = head.weight.shape
    stored = torch.empty(rows, columns, dtype=torch.int8, device=device)
    scale = torch.empty(rows, dtype=torch.float16, device=device)
    step = rows_of(columns)
    for first in range(0, rows, step):
        block = slice(first, first + step)
        stored[block], scale[block] = quantize_weight(head.weight[block].detach().to(device), 8)
    release(head.weight)
    return QuantizedLinear(columns, rows, 8, stored, scale)
