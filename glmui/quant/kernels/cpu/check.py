"""Are these kernels right on this machine? Asked before they compute anything for anybody."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from glmui.quant.kernels.cpu.native import Kernels, Numerics
from glmui.quant.packing import dequantize_weight, pack_int4

# How far from float64 a result may be, relative to its norm: some times what is usual (docs/kernels.md).
TOLERANCE: dict[Numerics, float] = {"exact": 3e-6, "balanced": 3e-4, "fast": 3e-2}
_ROWS_OF_X = (1, 2, 3, 4, 9)  # together they meet every size of tile
_SHAPES = ((70, 523, None), (33, 384, 96))  # rows, columns, group size: no multiple of a panel or a step


def error(got: Tensor, wanted: Tensor) -> float:
    """Distance of two results relative to the norm of the wanted one; infinite where either is not finite."""
    distance = ((got.double() - wanted).norm() / wanted.norm()).item()
    return distance if distance == distance else float("inf")


def is_right(kernels: Kernels) -> bool:
    """Whether every kernel agrees with torch on small random cases. Takes some milliseconds."""
    cases = chain(_cases(kernels), _attention(kernels), _small(kernels))
    return all(found <= limit for found, limit in cases)


def _cases(kernels: Kernels) -> Iterator[tuple[float, float]]:
    """(error, tolerance) of each case."""
    random = torch.Generator().manual_seed(6)
    for rows, columns, group_size in _SHAPES:
        bias = torch.randn(rows, generator=random)
        half = torch.randn(rows, columns, generator=random).half()
        for x in _inputs(columns, random):
            wanted = torch.nn.functional.linear(x.double(), half.double(), bias.double())
            yield error(kernels.half(x, half, bias), wanted), TOLERANCE["exact"]
        for bits in (4, 8):
            limit = 2 ** (bits - 1) - 1
            q = torch.randint(-limit, limit + 1, (rows, columns), generator=random, dtype=torch.int8)
            stored = pack_int4(q) if bits == 4 else q
            scale = torch.rand(rows, columns // (group_size or columns), generator=random) + 0.5
            matrix = dequantize_weight(stored, scale, bits, columns, torch.float64)
            packed = kernels.pack(stored, scale, bits, columns)
            for x in _inputs(columns, random):
                wanted = torch.nn.functional.linear(x.double(), matrix, bias.double())
                for numerics, tolerance in TOLERANCE.items():
                    yield error(kernels.linear(x, packed, bias, numerics), wanted), tolerance


def _attention(kernels: Kernels) -> Iterator[tuple[float, float]]:
    """The same for attention, by one head of keys for two of queries, and with tokens that are not seen."""
    random = torch.Generator().manual_seed(7)
    for kept in (torch.float32, torch.float16, torch.bfloat16):
        for rows, heads, tokens in ((1, 2, 131), (3, 4, 70)):
            queries = 2 * torch.randn(2, rows, heads, 48, generator=random)
            keys, values = torch.randn(2, 2, 2, tokens, 48, generator=random).to(kept)
            seen = torch.rand(2, 1, rows, tokens, generator=random) < 0.7
            for visible in (None, seen):
                wanted = attention(queries.double(), keys.double(), values.double(), visible)
                yield error(kernels.attend(queries, keys, values, visible), wanted), TOLERANCE["exact"]


def attention(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """What Kernels.attend should give."""
    q, scale = queries.transpose(1, 2), queries.shape[-1] ** -0.5
    k, v = (kept.repeat_interleave(q.shape[1] // kept.shape[1], dim=1) for kept in (keys, values))
    scores = q @ k.transpose(2, 3) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    found: Tensor = scores.softmax(-1) @ v
    return found.transpose(1, 2)


def _small(kernels: Kernels) -> Iterator[tuple[float, float]]:
    """The same for the activation and the rotary positions."""
    random = torch.Generator().manual_seed(8)
    x = 4 * torch.randn(1000, generator=random)
    wanted = torch.nn.functional.gelu(x.double(), approximate="tanh")
    yield error(kernels.gelu(x.clone()), wanted), TOLERANCE["exact"]
    heads, angles = torch.randn(2, 3, 4, 24, generator=random), torch.randn(2, 3, 1, 2, 6, generator=random)
    a, b = heads.double().view(2, 3, 4, 2, 2, 6).unbind(-2)
    cosine, sine = angles.double().cos(), angles.double().sin()
    wanted = torch.stack((a * cosine - b * sine, b * cosine + a * sine), dim=-2).flatten(-3)
    turned = kernels.rotate(heads.clone(), angles.cos(), angles.sin())
    yield error(turned, wanted), TOLERANCE["exact"]


def _inputs(columns: int, random: torch.Generator) -> list[Tensor]:
    return [torch.randn(count, columns, generator=random) for count in _ROWS_OF_X]
