"""INT8 and INT4 weights: the published bytes (packing), layers that keep them (linear), quantize() (swap)."""

from glmui.quant.linear import QuantizedEmbedding, QuantizedLinear, matmul
from glmui.quant.swap import quantize

__all__ = ["QuantizedEmbedding", "QuantizedLinear", "matmul", "quantize"]
