"""What a block computes between its linear layers, as modules: the seam for kernels (quant/fused.py).

A block holds an `Attention` and gives it queries, and the cache's keys and values as they lie there. None
of these has weights, so a checkpoint never sees them, and `use_kernels` may put a faster one with the same
numbers in its place.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from glmui.glm.rotary import rotate


class Attention(nn.Module):
    """softmax(q kᵀ / √d) v, in torch."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> Tensor:
        """queries [b, n, h, d]; keys and values [b, g, t, d], such as KVCache.read gives → [b, n, h, d].

        g divides h: heads 0..h/g-1 share the first keys, and so on (multi-query attention where g < h).
        Keys and values may be kept in another float dtype than is computed in. visible: [b, 1, n, t] bool,
        which tokens each row sees, at least one; None: all.
        """
        q = queries.transpose(1, 2)  # b h n d
        keys, values = keys.to(q), values.to(q)
        grouped = keys.shape[1] != q.shape[1]
        if grouped and q.device.type != "cpu":
            return _folded(q, keys, values, visible)
        found = F.scaled_dot_product_attention(q, keys, values, visible, enable_gqa=grouped)
        return found.transpose(1, 2)


def _folded(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """Attention [b, n, h, d] with the heads that share keys as more rows of one head: a card's kernel that
    saves memory knows no groups, and torch would copy the keys for each head."""
    batch, heads, count, size = q.shape
    shared = heads // keys.shape[1]
    rows = q.reshape(batch, -1, shared * count, size)  # b g (h/g n) d
    if visible is not None:
        visible = visible.repeat(1, 1, shared, 1)
    found = F.scaled_dot_product_attention(rows, keys, values, visible)
    return found.view(batch, heads, count, size).transpose(1, 2)


class Rotate(nn.Module):
    """Rotary positions, in two halves of a head (rotary.py)."""

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """x [b, n, h, d], turned by the angles of rotary_table's `table`. x may be used up."""
        return rotate(x, table)


class Gelu(nn.Module):
    """GELU in its tanh form."""

    def forward(self, x: Tensor) -> Tensor:
        """x [...] → the same shape. x may be used up."""
        return F.gelu(x, approximate="tanh")
