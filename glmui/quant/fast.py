"""The C kernels as layers of a model: use_kernels() swaps them in where torch would be slow."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from glmui.quant.fused import fuse
from glmui.quant.kernels.cpu import Kernels, Numerics, Packed, fits
from glmui.quant.linear import QuantizedLinear
from glmui.quant.mapped import release
from glmui.quant.packed_file import PackedLayer
from glmui.quant.packing import quantize_weight
from glmui.quant.swap import HEADS

# Up to so many rows the half head's kernel, which reads its weights once, beats widening them for torch.
HEAD_ROWS = 8


class KernelLinear(nn.Module):
    """A QuantizedLinear on the CPU whose weight lies in the kernels' order."""

    def __init__(
        self, packed: Packed, bias: nn.Parameter | None, kernels: Kernels, numerics: Numerics
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.columns, packed.rows
        self.bias = bias
        self.packed, self._kernels, self._numerics = packed, kernels, numerics

    @classmethod
    def of(cls, layer: PackedLayer, kernels: Kernels, numerics: Numerics) -> KernelLinear:
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        return cls(layer.packed, bias, kernels, numerics)

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [..., in] → float32 [..., out]."""
        return self._kernels.linear(x, self.packed, self.bias, self._numerics)

    def extra_repr(self) -> str:
        bits, name = self.packed.bits, self._kernels.name
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}, kernel={name}"


class KernelHead(nn.Module):
    """An output head with a float16 weight, which the kernel reads as it is."""

    def __init__(self, head: nn.Linear, kernels: Kernels) -> None:
        super().__init__()
        self._head, self._kernels = head, kernels

    @property
    def weight(self) -> Tensor:
        return self._head.weight

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [..., in] → logits float32 [..., out]."""
        if x[..., 0].numel() > HEAD_ROWS:
            logits: Tensor = self._head(x)
            return logits
        return self._kernels.half(x, self._head.weight)


def use_kernels(model: nn.Module, kernels: Kernels, numerics: Numerics, head_bits: int = 16) -> None:
    """Swap in kernels for all layers they can compute: quantised ones on the CPU that compute in float32,
    and a float16 output head (by its name), which head_bits=8 quantises (a sixth less to read for a token).

    A layer's own weight is let go once it is packed, so that no two copies of a model are ever held.
    """
    fuse(model, kernels)
    for name, layer in list(model.named_modules()):
        swapped: nn.Module | None = None
        if isinstance(layer, QuantizedLinear) and is_computable(layer):
            swapped = KernelLinear.of(pack_layer(layer, kernels), kernels, numerics)
        elif is_half_head(layer, name):
            swapped = KernelHead(layer, kernels)
            if head_bits == 8:
                swapped = KernelLinear.of(pack_head(layer, kernels), kernels, numerics)
        if swapped is not None:
            model.set_submodule(name, swapped)


def is_computable(layer: QuantizedLinear) -> bool:
    """Whether the kernels take such a layer where it is."""
    floats = layer.weight_scale if layer.bias is None else layer.bias
    on_cpu = layer.weight.device.type == "cpu" and floats.dtype == torch.float32
    groups = layer.weight_scale.shape[1] if layer.weight_scale.dim() == 2 else 1
    return on_cpu and fits(layer.in_features, groups, layer.weight_bit_width)


def is_half_head(layer: nn.Module, name: str) -> TypeGuard[nn.Linear]:
    """Whether this is a model's output head, in float16 on the CPU."""
    if name.rpartition(".")[2] not in HEADS or not isinstance(layer, nn.Linear):
        return False
    return layer.weight.dtype == torch.float16 and layer.weight.device.type == "cpu" and layer.bias is None


def pack_layer(layer: QuantizedLinear, kernels: Kernels) -> PackedLayer:
    """A quantised layer in the kernels' order; its own weight need not stay in memory any more."""
    packed = kernels.pack(layer.weight, layer.weight_scale, layer.weight_bit_width, layer.in_features)
    release(layer.weight)
    return PackedLayer(packed, layer.bias)


def pack_head(head: nn.Linear, kernels: Kernels) -> PackedLayer:
    """A float16 head in 8 bits and in the kernels' order."""
    stored, scale = quantize_weight(head.weight.detach(), 8)
    release(head.weight)  # the embedding, too: what of it is needed comes back row by row
    return PackedLayer(kernels.pack(stored, scale, 8, head.in_features), None)
