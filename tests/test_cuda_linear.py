"""A card's kernels for quantised matrices, run on this processor, against float64."""

from __future__ import annotations

import ctypes
from itertools import product
from math import ceil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glmui.quant.kernels.cuda.native import MOST_ROWS, CardKernels, Launch, Shape
from glmui.quant.packing import dequantize_weight, pack_int4
from tests.emulated_card import SOURCES, EmulatedModule, FencedModule

# Relative to the norm: what rounding the results may cost at most (2^-11 and 2^-8), and a little.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
DTYPES = tuple(TOLERANCE)

# rows, columns, group size. The fast kernels: less than a step, uneven rows and steps, warps along a row.
FAST = [(5, 32, None), (70, 640, None), (33, 384, 96), (9, 2400, None), (3, 4096, 1024)]
# What only the simple ones take: odd columns, groups that end within a piece.
OTHERS = [(7, 523, None), (6, 36, 6), (2, 1, None), (13, 45, 15)]


@pytest.fixture(scope="module")
def card() -> EmulatedModule:
    return EmulatedModule(SOURCES / "linear.cu")


@pytest.fixture(scope="module")
def kernels(card: EmulatedModule) -> CardKernels:
    return CardKernels(card, "emulated")


class Layer:
    """A random quantised layer: as published, and as float64."""

    def __init__(
        self, rows: int, columns: int, group_size: int | None, bits: int, dtype: torch.dtype
    ) -> None:
        self._random = torch.Generator().manual_seed(rows + columns)
        limit, self.bits, self.columns, self.dtype = 2 ** (bits - 1), bits, columns, dtype
        q = torch.randint(-limit, limit, (rows, columns), generator=self._random, dtype=torch.int8)
        scale = torch.rand(rows, columns // (group_size or columns), generator=self._random) + 0.1
        scale = (scale / limit).half()
        self.weight = pack_int4(q) if bits == 4 else q
        self.scale = scale if group_size else scale[:, 0].contiguous()
        self.bias = self.x(rows)
        self.matrix = dequantize_weight(self.weight, scale, bits, columns, torch.float64)

    def x(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random).to(self.dtype)

    def error(self, kernels: CardKernels, x: Tensor, bias: Tensor | None) -> float:
        got = kernels.linear(x, self.weight, self.scale, self.bits, bias)
        assert got.dtype == self.dtype
        wanted = torch.nn.functional.linear(x.double(), self.matrix, None if bias is None else bias.double())
        assert got.shape == wanted.shape
        return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize(("columns", "bits"), list(product((416, 45), (4, 8))), ids=str)
@pytest.mark.parametrize("count", [1, 3, 7])
def test_no_memory_but_the_tensors_is_touched(
    card: EmulatedModule, columns: int, bits: int, count: int, at_end: bool
) -> None:
    layer = Layer(11, columns, None, bits, torch.float16)
    x, out = layer.x(count, columns), torch.empty(11, columns, dtype=torch.float16)
    stored = layer.weight.nbytes, layer.scale.nbytes
    sizes = [x.nbytes, *stored, layer.bias.nbytes, 2 * 11 * count]
    fenced = CardKernels(FencedModule(card, dict(enumerate(sizes)), at_end), "emulated")
    assert layer.error(fenced, x, layer.bias) < TOLERANCE[torch.float16]
    fenced = CardKernels(FencedModule(card, dict(enumerate([*stored, out.nbytes])), at_end), "emulated")
    fenced.widen(layer.weight, layer.scale, bits, out)
    assert torch.equal(out, layer.matrix.half())


@pytest.mark.parametrize("shape", [*FAST, *OTHERS], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_agrees_with_float64(
    kernels: CardKernels, shape: tuple[int, int, int | None], bits: int, dtype: torch.dtype
) -> None:
    layer = Layer(*shape, bits, dtype)
    for count, bias in ((1, layer.bias), (2, None), (3, layer.bias), (8, layer.bias)):
        assert layer.error(kernels, layer.x(count, layer.columns), bias) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [4, 8])
def test_any_number_of_rows_up_to_the_most(kernels: CardKernels, bits: int) -> None:
    layer = Layer(37, 256, None, bits, torch.float16)
    for count in range(1, MOST_ROWS + 1):
        assert layer.error(kernels, layer.x(count, 256), layer.bias) < TOLERANCE[torch.float16]
    assert layer.error(kernels, layer.x(2, 3, 256), layer.bias) < TOLERANCE[torch.float16]
    assert layer.error(kernels, layer.x(256), None) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("bits", "count", "columns"), [(4, 1, 40000), (4, 8, 4128), (8, 1, 17000), (8, 5, 4096)]
)
def test_more_columns_than_shared_memory_has_room_for(
    kernels: CardKernels, bits: int, count: int, columns: int
) -> None:
    layer = Layer(5, columns // 32 * 32, None, bits, torch.float16)
    assert layer.error(kernels, layer.x(count, layer.columns), layer.bias) < TOLERANCE[torch.float16]


def test_outliers_among_the_activations_do_no_harm(kernels: CardKernels) -> None:
    layer = Layer(16, 512, None, 4, torch.float16)
    x = layer.x(1, 512)
    x[0, 17], x[0, 300] = 3e3, -1e-6
    assert layer.error(kernels, x, None) < TOLERANCE[torch.float16]


def test_what_is_no_number_stays_none(kernels: CardKernels) -> None:
    layer = Layer(8, 128, None, 4, torch.float16)
    x = layer.x(2, 128)
    x[0, 5] = torch.nan
    y = kernels.linear(x, layer.weight, layer.scale, 4)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_tensors_may_begin_anywhere(kernels: CardKernels, bits: int) -> None:
    layer = Layer(9, 128, None, bits, torch.float16)
    x = layer.x(2 * 128 + 1)[1:].view(2, 128)
    assert layer.error(kernels, x, layer.bias) < TOLERANCE[torch.float16]
    moved = torch.empty(layer.weight.numel() + 1, dtype=torch.int8)[1:].view_as(layer.weight)
    layer.weight = moved.copy_(layer.weight)
    assert layer.error(kernels, layer.x(2, 128), layer.bias) < TOLERANCE[torch.float16]
    out = torch.empty(9 * 128 + 1, dtype=torch.float16)[1:].view(9, 128)
    kernels.widen(layer.weight, layer.scale, bits, out)
    assert torch.equal(out, layer.matrix.half())


@pytest.mark.parametrize("shape", [(5, 32, None), (6, 1000, 40), *OTHERS], ids=str)
@pytest.mark.parametrize(("bits", "dtype"), list(product((4, 8), DTYPES)), ids=str)
def test_a_matrix_is_widened_and_rounded_once(
    kernels: CardKernels, shape: tuple[int, int, int | None], bits: int, dtype: torch.dtype
) -> None:
    layer = Layer(*shape, bits, dtype)
    out = torch.empty(layer.matrix.shape, dtype=dtype)
    kernels.widen(layer.weight, layer.scale, bits, out)
    assert torch.equal(out, layer.matrix.to(dtype))


def test_some_rows_are_widened(kernels: CardKernels) -> None:
    layer = Layer(12, 64, 32, 4, torch.float16)
    scratch = torch.zeros(6, 64, dtype=torch.float16)
    kernels.widen(layer.weight[3:8], layer.scale[3:8], 4, scratch[:5])
    assert torch.equal(scratch[:5], layer.matrix[3:8].half())
    assert not scratch[5].any()


def test_nothing_in_gives_nothing(kernels: CardKernels) -> None:
    layer = Layer(4, 32, None, 4, torch.float16)
    assert kernels.linear(layer.x(0, 32), layer.weight, layer.scale, 4).shape == (0, 4)
    assert kernels.linear(layer.x(2, 32), layer.weight[:0], layer.scale[:0], 4).shape == (2, 0)
    kernels.widen(layer.weight[:0], layer.scale[:0], 4, layer.x(0, 32))


WRONG = {
    "columns": {"x": torch.zeros(1, 34, dtype=torch.float16)},
    "no columns": {"x": torch.zeros(1, 0).half(), "weight": torch.zeros(4, 0, dtype=torch.int8)},
    "too many rows": {"x": torch.zeros(MOST_ROWS + 1, 32, dtype=torch.float16)},
    "float32": {"x": torch.zeros(1, 32)},
    "elsewhere": {"x": torch.zeros(1, 32, dtype=torch.float16, device="meta")},
    "weight's dtype": {"weight": torch.zeros(4, 16, dtype=torch.uint8)},
    "weight's order": {"weight": torch.zeros(16, 4, dtype=torch.int8).t()},
    "weight's shape": {"weight": torch.zeros(4 * 16, dtype=torch.int8)},
    "scale's dtype": {"scale": torch.zeros(4)},
    "scale's rows": {"scale": torch.zeros(5, dtype=torch.float16)},
    "groups": {"scale": torch.zeros(4, 3, dtype=torch.float16)},
    "no groups": {"scale": torch.zeros(4, 0, dtype=torch.float16)},
    "one scale": {"scale": torch.tensor(1.0, dtype=torch.float16)},
    "bits": {"bits": 5},
    "bias's dtype": {"bias": torch.zeros(4)},
    "bias's shape": {"bias": torch.zeros(3, dtype=torch.float16)},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(kernels: CardKernels, what: str) -> None:
    right = {
        "x": torch.zeros(1, 32, dtype=torch.float16),
        "weight": torch.zeros(4, 16, dtype=torch.int8),
        "scale": torch.zeros(4, dtype=torch.float16),
        "bits": 4,
        "bias": torch.zeros(4, dtype=torch.float16),
    }
    assert kernels.linear(**right).shape == (1, 4)
    with pytest.raises(ValueError, match=r"."):
        kernels.linear(**(right | WRONG[what]))


def test_room_for_a_wide_matrix_must_fit(kernels: CardKernels) -> None:
    layer = Layer(4, 32, None, 4, torch.float16)
    for out in (layer.x(5, 32), layer.x(4, 34), layer.x(32, 4).t(), layer.x(4, 32).float()):
        with pytest.raises(ValueError, match=r"."):
            kernels.widen(layer.weight, layer.scale, 4, out)


def test_lanes_that_read_x_together_meet_different_banks(tmp_path: Path) -> None:
    """Eight lanes read 16 bytes each at a time, out of 128 bytes of banks."""
    source = tmp_path / "seats.cu"
    body = "const word i = threadIdx.x; four[i] = seat<4>(i), two[i] = seat<2>(i);"
    source.write_text(f'#include "linear.cu"\nKERNEL(seats, (word *four, word *two)) {{ {body} }}\n')
    found = torch.empty(2, 128, dtype=torch.int32)
    addresses = [ctypes.c_void_p(row.data_ptr()) for row in found]
    EmulatedModule(source).function("seats_half")((1, 1, 1), (128, 1, 1), 0, addresses)
    for seats, octets in zip(found, (4, 2), strict=True):  # of a piece, in 4 bits and in 8
        assert torch.equal(seats.sort().values, torch.arange(128, dtype=torch.int32))
        banks = (seats % 8).view(-1, 8, octets)  # [eight lanes, lane, octet of its piece]
        assert torch.equal(banks.sort(dim=1).values, torch.arange(8)[None, :, None].expand_as(banks))


@given(
    bits=st.sampled_from((4, 8)),
    kind=st.sampled_from((1, 2, 4, 8)),
    rows=st.integers(1, 200_000),
    pieces=st.integers(1, 3000),
)
def test_every_matrix_is_shared_out_within_what_a_card_has(
    bits: int, kind: int, rows: int, pieces: int
) -> None:
    """And as linear.cu wants it: the warps along a row go through a chunk of x two steps at a time."""
    piece = 128 // bits
    launch = Launch.of(Shape(bits, rows, pieces * piece, 1), kind)
    (lanes, along, across), each = launch.block, 4 if kind == 1 else 2
    assert (lanes, along * across) == (32, 8)
    assert (launch.grid[0] - 1) * across * each < rows <= launch.grid[0] * across * each
    assert max(2 * kind * piece * launch.chunk, 4 * 8 * each * kind) <= launch.shared <= 32 << 10
    assert launch.chunk >= pieces or launch.chunk % (64 * along) == 0
    assert along <= ceil(pieces / 32)
