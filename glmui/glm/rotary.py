"""Rotary positions, twice: one half of each head turns with the position, the other with the block.

Inside a half of R = head_size / 2 dimensions, dimension i turns together with dimension i + R/2, by the
angle p * 10000^(-2i/R) (Su et al., 2021, in the layout of GPT-NeoX).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for positions [batch, 2, n]: each [batch, n, 1, 2, head_size/4], in `dtype`.

    The frequencies are rounded to float16 whatever the dtype, as the model was trained. In float16 the
    angles are rounded too, as published; in bfloat16 that would leave nothing of them, so there they are not.
    """
    size = head_size // 2
    exponents = torch.arange(0, size, 2, device=positions.device).float() / size
    frequencies = (1.0 / 10000**exponents).half()  # [head_size/4]
    precision = torch.float16 if dtype == torch.float16 else torch.float32
    turns = positions.transpose(1, 2)[:, :, None, :, None]  # [batch, n, 1, 2, 1]
    angles = turns.to(precision) * frequencies.to(precision)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys [batch, n, heads, head_size] by their positions' angles."""
    cos, sin = table
    a, b = x.view(*x.shape[:-1], 2, 2, -1).unbind(-2)  # each [batch, n, heads, 2, head_size/4]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-2).flatten(-3)
