"""Layers whose weights stay quantised in memory."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from glmui.errors import InvalidInput
from glmui.quant.packing import dequantize_weight, planes, quantize_weight, rows_of, scaled

# Weights widened at a time on a card: each operation takes a while to start there, so fewer and larger ones.
CARD_BLOCK = 1 << 24


def matmul(x: Tensor, weight: Tensor, scale: Tensor, bits: int, whole: bool = False) -> Tensor:
    """x [..., columns] times the transposed quantised matrix → [..., rows], in x's dtype.

    weight: int8 as packing.py stores it. scale: [rows] or [rows, groups]. This is the reference that
    any faster kernel must agree with: a block of rows (all of them if `whole`, but on a CPU) is widened,
    multiplied and forgotten.
    """
    inputs = (x,) if bits == 8 else _even_and_odd(x)
    out = x.new_empty(*x.shape[:-1], len(weight))
    step = _rows_at_a_time(x, len(weight), whole)
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        matrices = (scaled(q, scale[rows], x.dtype) for q in planes(weight[rows], bits))
        products = (F.linear(part, matrix) for part, matrix in zip(inputs, matrices, strict=True))
        out[..., rows] = sum(products)
    return out


def _rows_at_a_time(x: Tensor, rows: int, whole: bool) -> int:
    if x.device.type == "cpu":
        return rows_of(x.shape[-1])  # a whole matrix would fall out of the caches
    return max(1, rows) if whole else rows_of(x.shape[-1], CARD_BLOCK)


def _even_and_odd(x: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that meet the high and the low nibbles; cheaper than putting the nibbles in order."""
    x = F.pad(x, (0, x.shape[-1] % 2))
    return x[..., 0::2].contiguous(), x[..., 1::2].contiguous()


class QuantizedLinear(nn.Module):
    """nn.Linear with a quantised weight.

    weight:       int8, [out, in] for 8 bits or [out, ceil(in / 2)] for 4
    weight_scale: float, [out], or [out, in / group_size]
    bias:         float, [out], or None
    whole:        on a card, widen the whole matrix to multiply it, not one part after the other
    """

    whole = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_bit_width: int,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_bit_width = weight_bit_width
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(
        cls, linear: nn.Linear, bits: int, group_size: int | None = None, wide: bool = True
    ) -> QuantizedLinear:
        """The quantised form of a linear layer; on the meta device, one of the right shapes.

        wide: see packing.quantize_weight. Raises InvalidInput when group_size does not divide the layer's
        width.
        """
        check_group_size(linear.in_features, bits, group_size)
        weight, scale = quantize_weight(linear.weight.detach(), bits, group_size, wide)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(linear.in_features, linear.out_features, bits, weight, scale, bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out] in x's dtype."""
        out = matmul(x, self.weight, self.weight_scale, self.weight_bit_width, self.whole)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight_bit_width={self.weight_bit_width}"
        )


class QuantizedEmbedding(nn.Module):
    """nn.Embedding with a quantised table, stored like a QuantizedLinear's weight: [count, size]."""

    def __init__(self, size: int, weight_bit_width: int, weight: Tensor, weight_scale: Tensor) -> None:
        super().__init__()
        self.embedding_dim = size
        self.weight_bit_width = weight_bit_width
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)

    @classmethod
    def of(cls, embedding: nn.Embedding, bits: int, group_size: int | None = None) -> QuantizedEmbedding:
        """The quantised form of an embedding. Raises InvalidInput like QuantizedLinear.of."""
        check_group_size(embedding.embedding_dim, bits, group_size)
        weight, scale = quantize_weight(embedding.weight.detach(), bits, group_size)
        return cls(embedding.embedding_dim, bits, weight, scale)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → vectors [..., size] in the scale's dtype."""
        flat = ids.flatten()
        rows = self.weight[flat], self.weight_scale[flat]
        vectors = dequantize_weight(*rows, self.weight_bit_width, self.embedding_dim, self.weight_scale.dtype)
        return vectors.view(*ids.shape, self.embedding_dim)

    def head(self) -> QuantizedLinear:
        """An output head that uses this very table."""
        head = QuantizedLinear(
            self.embedding_dim, len(self.weight), self.weight_bit_width, self.weight, self.weight_scale
        )
        head.weight, head.weight_scale = self.weight, self.weight_scale
        return head


def check_group_size(columns: int, bits: int, group_size: int | None) -> None:
    """Raises InvalidInput unless `group_size` divides `columns` (for 4 bits, into whole bytes)."""
    if group_size is None:
        return
    if group_size < 1 or columns % group_size or (bits == 4 and group_size % 2):
        raise InvalidInput("group_size_does_not_fit", group_size=group_size, columns=columns)
