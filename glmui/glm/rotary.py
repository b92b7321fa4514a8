"""Rotary positions (Su et al., 2021): of R = head_size / 2 dimensions two turn together by p * 10000^(-2i/R).

ChatGLM-6B turns both halves of a head, one with the position, the other with the block; dimension i goes
with dimension i + R/2, the layout of GPT-NeoX. ChatGLM2 and 3 turn the first half of a head only, and
neighbours, 2i and 2i + 1, go together, the layout of GPT-J.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmui.glm.config import GLM2Config


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


def pair_table(positions: Tensor, config: GLM2Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ChatGLM2's and 3's cos and sin for positions [batch, n]: each [batch, n, 1, head_size/4], in `dtype`.

    In float16 ChatGLM2 rounds frequencies, positions and angles too, as published (beyond position 2048
    neighbours share one); in bfloat16 that would leave nothing of them, so there they are not. ChatGLM3
    rounds the end only. A rope_ratio stretches the wave lengths of ChatGLM3 and the positions of ChatGLM2.
    """
    size = config.head_size // 2
    as_chatglm2 = config.family == "chatglm2"
    precision = torch.float16 if as_chatglm2 and dtype == torch.float16 else torch.float32
    base = 10000 if as_chatglm2 else 10000 * config.rope_ratio
    exponents = torch.arange(0, size, 2, device=positions.device).to(precision) / size
    frequencies = 1.0 / base**exponents  # [head_size/4]
    places = positions / config.rope_ratio if as_chatglm2 else positions
    angles = (places[..., None, None].to(precision) * frequencies).float()  # [batch, n, 1, head_size/4]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_pairs(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first half of queries or keys [batch, n, heads, head_size] by their positions' angles."""
    turned, rest = x.chunk(2, dim=-1)
    a, b = turned.reshape(*turned.shape[:-1], -1, 2).unbind(-1)  # each [batch, n, heads, head_size/4]
    cos, sin = table
    pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((pairs, rest), dim=-1)
