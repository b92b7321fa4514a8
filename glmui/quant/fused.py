"""What stands between a model's linear layers, in C: attention, rotary positions, the activation.

Each is the torch module of glm/ with another `forward`, and falls back on torch's where torch is as fast
(long prompts) or where only torch can compute (a card, another dtype).
"""

from __future__ import annotations

from torch import Tensor, float32, nn

from glmui.glm.attention import Attention, Gelu, Rotate
from glmui.quant.kernels.cpu import Kernels

# Up to so many new tokens the kernel, which reads keys and values as they are kept, is the faster one.
ATTENTION_ROWS = 8


class KernelAttention(Attention):
    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self._kernels = kernels

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> Tensor:
        """See Attention."""
        few = queries.shape[1] <= ATTENTION_ROWS and queries.shape[-1] % 16 == 0
        if few and _is_ours(queries):
            return self._kernels.attend(queries, keys, values, visible)
        return super().forward(queries, keys, values, visible)


class KernelRotate(Rotate):
    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self._kernels = kernels

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """See Rotate. In place."""
        return self._kernels.rotate(x, *table) if _is_ours(x) else super().forward(x, table)


class KernelGelu(Gelu):
    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """See Gelu. In place."""
        return self._kernels.gelu(x) if _is_ours(x) and x.is_contiguous() else super().forward(x)


_FUSED = {Attention: KernelAttention, Rotate: KernelRotate, Gelu: KernelGelu}


def fuse(model: nn.Module, kernels: Kernels) -> None:
    """Swap in kernels for what a model computes between its linear layers."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if kind := _FUSED.get(type(child)):
                setattr(parent, name, kind(kernels))


def _is_ours(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == float32
