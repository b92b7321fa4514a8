"""Are these kernels right on this machine? Asked before they compute anything for anybody."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glmui.quant.kernels.native import Kernels, Numerics
from glmui.quant.packing import dequantise, pack

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
    return all(found <= limit for found, limit in _cases(kernels))


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
            stored = pack(q) if bits == 4 else q
            scale = torch.rand(rows, columns // (group_size or columns), generator=random) + 0.5
            matrix = dequantise(stored, scale, bits, columns, torch.float64)
            packed = kernels.pack(stored, scale, bits, columns)
            for x in _inputs(columns, random):
                wanted = torch.nn.functional.linear(x.double(), matrix, bias.double())
                for numerics, tolerance in TOLERANCE.items():
                    yield error(kernels.linear(x, packed, bias, numerics), wanted), tolerance


def _inputs(columns: int, random: torch.Generator) -> list[Tensor]:
    return [torch.randn(count, columns, generator=random) for count in _ROWS_OF_X]
