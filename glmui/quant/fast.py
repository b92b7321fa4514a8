"""The C kernels as layers of a model: use_kernels() swaps them in where torch would be slow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glmui.quant.kernels import Kernels, Numerics, Packed, fits
from glmui.quant.linear import QuantizedLinear
from glmui.quant.mapped import release
from glmui.quant.packing import quantise

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
    and a float16 head called lm_head, which head_bits=8 quantises (a sixth less to read for each token).

    A layer's own weight is let go once it is packed, so that no two copies of a model are ever held.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear) and _computable(child):
                setattr(parent, name, _swapped(child, kernels, numerics))
            elif name == "lm_head" and isinstance(child, nn.Linear) and _is_half(child):
                head = (
                    _in_eight_bits(child, kernels, numerics) if head_bits == 8 else KernelHead(child, kernels)
                )
                setattr(parent, name, head)


def _computable(layer: QuantizedLinear) -> bool:
    floats = layer.weight_scale if layer.bias is None else layer.bias
    on_cpu = layer.weight.device.type == "cpu" and floats.dtype == torch.float32
    groups = layer.weight_scale.shape[1] if layer.weight_scale.dim() == 2 else 1
    return on_cpu and fits(layer.in_features, groups, layer.weight_bit_width)


def _swapped(layer: QuantizedLinear, kernels: Kernels, numerics: Numerics) -> KernelLinear:
    packed = kernels.pack(layer.weight, layer.weight_scale, layer.weight_bit_width, layer.in_features)
    release(layer.weight)
    return KernelLinear(packed, layer.bias, kernels, numerics)


def _in_eight_bits(head: nn.Linear, kernels: Kernels, numerics: Numerics) -> KernelLinear:
    stored, scale = quantise(head.weight.detach(), 8)
    release(head.weight)  # the embedding, too: what of it is needed comes back row by row
    return KernelLinear(kernels.pack(stored, scale, 8, head.in_features), None, kernels, numerics)


def _is_half(head: nn.Linear) -> bool:
    return head.weight.dtype == torch.float16 and head.weight.device.type == "cpu" and head.bias is None
