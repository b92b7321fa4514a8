"""INT8 and INT4 weights, byte for byte as ChatGLM-6B publishes them.

Each output row r has one scale (or one for every group of columns, which is ours):

    scale[r] = max|W[r, :]| / (2^(bits-1) - 1)           /7 or /127: symmetric, no zero point
    q[r, c]  = round(W[r, c] / scale[r])                 half to even

INT8 stores q. INT4 stores two columns in a byte, the even one in the high nibble, both in two's
complement:  byte[r, j] = q[r, 2j] << 4 | q[r, 2j+1] & 15.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Weights worked on at a time, so that no whole matrix is ever widened (4 MiB in float32, which caches like).
BLOCK = 1 << 20


def pack_int4(q: Tensor) -> Tensor:
    """INT4 values [rows, columns] int8 → bytes [rows, ceil(columns / 2)] int8."""
    if q.shape[-1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    even, odd = q[..., 0::2], q[..., 1::2]
    return (even << 4) | (odd & 15)


def planes(stored: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Stored bytes [rows, n] as the integers they hold, int8 [rows, n] each: all columns for 8 bits, the
    even and the odd columns for 4."""
    return (stored,) if bits == 8 else (stored >> 4, (stored << 4) >> 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Bytes [rows, n] int8 → INT4 values [rows, 2n] int8, -8..7."""
    return torch.stack(planes(packed, 4), dim=-1).flatten(-2)


def quantize_weight(
    weight: Tensor, bits: int, group_size: int | None = None, wide: bool = True
) -> tuple[Tensor, Tensor]:
    """A float matrix [rows, columns] → (stored int8, scale in the matrix's dtype).

    Stored: [rows, columns] for 8 bits, [rows, ceil(columns / 2)] for 4. Scale: [rows], or
    [rows, columns / group_size]. The scale is computed in the weight's dtype. wide: the division in
    float32, as the published CPU code of ChatGLM-6B does; else in the weight's dtype too, as that of
    ChatGLM2 and 3 does (one value in 500 differs by one). A row of zeros stays zeros. On the meta device:
    the shapes.
    """
    if weight.is_meta:  # torch computes shapes in Python there, step by step: seconds for a whole model
        return _shapes(weight, bits, group_size)
    limit = 2 ** (bits - 1) - 1
    stored, scales = [], []
    for rows in torch.split(weight, rows_of(weight.shape[1])):
        groups = rows.reshape(len(rows), -1, group_size or rows.shape[1])  # [rows, groups, group]
        scale = groups.abs().amax(dim=-1) / limit  # [rows, groups]
        divisor = scale.masked_fill(scale == 0, 1)[..., None]
        quotient = groups.float() / divisor.float() if wide else groups / divisor
        q = quotient.round_().clamp_(-limit, limit).to(torch.int8).flatten(1)
        stored.append(pack_int4(q) if bits == 4 else q)
        scales.append(scale if group_size else scale[:, 0])
    return torch.cat(stored), torch.cat(scales)


def _shapes(weight: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    stored = weight.new_empty(rows, columns if bits == 8 else -(-columns // 2), dtype=torch.int8)
    return stored, weight.new_empty(rows, columns // group_size) if group_size else weight.new_empty(rows)


def dequantize_weight(stored: Tensor, scale: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix [rows, columns] that stored bytes and their scale stand for, rounded to `dtype`."""
    return scaled(unpack_int4(stored)[:, :columns] if bits == 4 else stored, scale, dtype)


def scaled(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers [rows, columns] times their scale [rows] or [rows, groups], in `dtype`."""
    values, scale = q.to(dtype), scale.to(dtype)
    if scale.dim() == 1:
        return values.mul_(scale[:, None])
    return values.view(*scale.shape, -1).mul_(scale[..., None]).flatten(1)


def rows_of(columns: int, block: int = 0) -> int:
    """How many rows of so many columns make a block of values, a BLOCK unless told otherwise."""
    return max(1, (block or BLOCK) // max(1, columns))
