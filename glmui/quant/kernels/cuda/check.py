"""Are these kernels right on this card? Asked before they compute anything for anybody.

What they should give is computed on the CPU in float64, which needs neither the card's memory nor its
libraries.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from glmui.glm.cache import Room, in_int8
from glmui.glm.rotary import rotate, rotate_pairs
from glmui.quant.kernels.cuda.block import BlockKernels, Turns
from glmui.quant.kernels.cuda.native import MOST_ROWS, CardKernels
from glmui.quant.packing import dequantize_weight, pack_int4

_log = logging.getLogger(__name__)

# How far from float64 a result may be, relative to its norm: a few times what rounding its numbers costs.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_IN_INT8 = 4e-3  # of what is kept in int8: now and then a number falls to the other side of a half
_TOKENS = 203  # in a room, so that some blocks share them
_COUNTS = (1, 2, 3, MOST_ROWS)  # rows of x; together they meet every kernel
# Rows, columns, groups of a row, rows of x: what only the kernels for any shape take; what the fast ones
# take, as a whole and in groups; more columns than a block keeps of x at once.
_SHAPES = ((13, 45, 3, _COUNTS), (70, 640, 1, _COUNTS), (33, 4096, 16, _COUNTS), (9, 17408, 1, (1,)))

Case = tuple[str, float, float]  # what was computed, its error, its tolerance


@dataclass(frozen=True, slots=True)
class _Maker:
    """Random numbers in a dtype, the same ones on every machine, and the way to a device."""

    dtype: torch.dtype
    device: str
    random: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def there(self, x: Tensor) -> Tensor:
        """A copy on the device."""
        return x.to(self.device, copy=True)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]


def linear_is_right(kernels: CardKernels, dtypes: Iterable[torch.dtype], device: str) -> bool:
    """Whether every kernel for linear layers agrees with torch on small random cases, in each dtype.

    Raises what starting a kernel raises, and RuntimeError where one ends with a fault.
    """
    return _all_right(_linear(kernels, make) for make in _makers(dtypes, device))


def block_is_right(kernels: BlockKernels, dtypes: Iterable[torch.dtype], device: str) -> bool:
    """The same for the kernels of what stands between linear layers."""
    kinds = (_norms, _activations, _attention)
    return _all_right(cases(kernels, make) for make in _makers(dtypes, device) for cases in kinds)


def _makers(dtypes: Iterable[torch.dtype], device: str) -> Iterator[_Maker]:
    for dtype in dtypes:
        yield _Maker(dtype, device, torch.Generator().manual_seed(6))


def _all_right(kinds: Iterable[Iterator[Case]]) -> bool:
    with _new_memory_is_nan():
        for cases in kinds:
            for name, found, limit in cases:
                if not found <= limit:
                    _log.debug("%s is off by %.2g; at most %.2g", name, found, limit)
                    return False
    return True


@contextmanager
def _new_memory_is_nan() -> Iterator[None]:
    """A kernel that writes nothing must not be taken for right because an earlier, right result lies in the
    memory that it was given: torch fills new tensors where it is to be deterministic."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import torch's compiler
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def error(got: Tensor, wanted: Tensor) -> float:
    """Distance of two results relative to the norm of the wanted one; infinite where either is not finite."""
    wanted = wanted.double()
    distance = ((got.cpu().double() - wanted).norm() / wanted.norm()).item()
    return distance if math.isfinite(distance) else math.inf


def _linear(kernels: CardKernels, make: _Maker) -> Iterator[Case]:
    for rows, columns, groups, counts in _SHAPES:
        for bits in (4, 8):
            limit = 2 ** (bits - 1)
            q = torch.randint(-limit, limit, (rows, columns), generator=make.random, dtype=torch.int8)
            scale = ((torch.rand(rows, groups, generator=make.random) + 0.5) / limit).half()
            stored, scale = (
                pack_int4(q) if bits == 4 else q,
                scale if groups > 1 else scale[:, 0].contiguous(),
            )
            inputs = [make.normal(count, columns) for count in counts]
            yield from _multiplied(kernels, make, stored, scale, bits, inputs)


def _multiplied(
    kernels: CardKernels, make: _Maker, stored: Tensor, scale: Tensor, bits: int, inputs: Sequence[Tensor]
) -> Iterator[Case]:
    columns = inputs[0].shape[1]
    matrix, about = (
        dequantize_weight(stored, scale, bits, columns, torch.float64),
        f"{bits} bits, {columns} columns",
    )
    weight = make.there(stored), make.there(scale), bits
    out = torch.empty(matrix.shape, dtype=make.dtype, device=make.device)
    kernels.widen(*weight, out)
    yield f"widen, {about}", error(out, matrix), make.tolerance
    bias = make.normal(len(matrix))
    for x in inputs:
        wanted = x.double() @ matrix.T
        name = f"linear of {len(x)} rows, {about}"
        yield name, error(kernels.linear(make.there(x), *weight), wanted), make.tolerance
        got = kernels.linear(make.there(x), *weight, make.there(bias))
        yield f"{name}, with a bias", error(got, wanted + bias.double()), make.tolerance


def _norms(kernels: BlockKernels, make: _Maker) -> Iterator[Case]:
    for columns in (136, 1032):
        x, residual = make.normal(3, columns), make.normal(3, columns)
        weight, bias = make.normal(columns), make.normal(columns)
        parts = make.there(x), make.there(weight)
        for added in (None, residual):
            there = None if added is None else make.there(added)
            total = x.double() if added is None else x.double() + 2.5 * added.double()
            wanted = F.layer_norm(total, (columns,), weight.double(), bias.double(), 1e-5)
            got = kernels.layer_norm(*parts, make.there(bias), 1e-5, there, 2.5)
            yield "layer_norm", error(got, wanted), make.tolerance
            total = x.double() if added is None else x.double() + added.double()
            wanted = F.rms_norm(total, (columns,), weight.double(), 1e-5)
            got, summed = kernels.rms_norm(*parts, 1e-5, there)
            yield "rms_norm", error(got, wanted), make.tolerance
            yield "rms_norm's sum", error(summed, total), make.tolerance


def _activations(kernels: BlockKernels, make: _Maker) -> Iterator[Case]:
    x = 3 * make.normal(3, 602)
    gate, up = x.double().chunk(2, -1)
    yield "gelu", error(kernels.gelu(make.there(x)), F.gelu(x.double(), approximate="tanh")), make.tolerance
    yield "swiglu", error(kernels.swiglu(make.there(x)), F.silu(gate) * up), make.tolerance


def _attention(kernels: BlockKernels, make: _Maker) -> Iterator[Case]:
    """As ChatGLM-6B and as ChatGLM2 has it, in heads of the usual size and of another: a token that is the
    first, and one after many and a prefix."""
    for beside, heads, groups, size in (
        (True, 3, 3, 128), (False, 6, 2, 128), (True, 2, 2, 64), (False, 6, 2, 64),
    ):  # fmt: skip
        for in_8_bits in (False, True):
            for place, front in ((0, 0), (197, 3)):
                room = _room(make, groups, size, in_8_bits)
                yield from _attended(kernels, make, room, beside, heads, place, front)


def _room(make: _Maker, groups: int, size: int, in_8_bits: bool) -> Room:
    keys, values = make.normal(1, groups, _TOKENS, size), make.normal(1, groups, _TOKENS, size)
    if not in_8_bits:
        return Room(keys, values, None, None, make.dtype)
    (keys, key_scale), (values, value_scale) = in_int8(keys), in_int8(values)
    return Room(keys, values, key_scale, value_scale, make.dtype)


def _attended(
    kernels: BlockKernels, make: _Maker, room: Room, beside: bool, heads: int, place: int, front: int
) -> Iterator[Case]:
    _, groups, _, size = room.keys.shape
    row = make.normal(1, (heads + 2 * groups) * size)
    angles = torch.randn(_TOKENS, size // (2 if beside else 4), generator=make.random)
    cosine, sine = angles.cos().to(make.dtype), angles.sin().to(make.dtype)
    used = room.changed(make.there)
    scratch = kernels.scratch(heads, used)
    now = torch.tensor([place], dtype=torch.int32, device=make.device)
    turns = Turns(make.there(cosine), make.there(sine), now, beside)
    for _ in range(2):  # the second time, the scratch is as the first one left it
        got = kernels.attend(make.there(row), turns, used, front, scratch)

    query, key, value = _parts(row, heads, groups, size, beside)
    turn = _turn(cosine[place].double(), sine[place].double(), beside)
    room.put(front + place, turn(key).transpose(1, 2).to(make.dtype), value.transpose(1, 2).to(make.dtype))
    kept = replace(room, dtype=torch.float64)
    wanted = _attention_of(turn(query).transpose(1, 2), *kept.get(front + place + 1))
    name = f"attend, {heads} heads of {groups}, {room.keys.dtype}, token {place}"
    yield name, error(got, wanted), make.tolerance
    written = used.changed(Tensor.cpu)
    limit = make.tolerance if room.key_scale is None else max(_IN_INT8, make.tolerance)
    for found, wished in zip(
        replace(written, dtype=torch.float64).get(_TOKENS), kept.get(_TOKENS), strict=True
    ):
        yield f"what is kept by {name}", error(found, wished), limit


def _parts(row: Tensor, heads: int, groups: int, size: int, beside: bool) -> tuple[Tensor, ...]:
    """Queries, keys and values of a row, float64 [1, 1, heads or groups, size] each."""
    if beside:
        return row.double().view(1, 1, heads, 3, size).unbind(3)
    parts = torch.split(row.double(), [heads * size, groups * size, groups * size], dim=-1)
    return tuple(part.reshape(1, 1, -1, size) for part in parts)


def _turn(cosine: Tensor, sine: Tensor, beside: bool) -> Callable[[Tensor], Tensor]:
    shape = (1, 1, 1, 2, -1) if beside else (1, 1, 1, -1)
    table = cosine.view(shape), sine.view(shape)
    return lambda x: rotate(x, table) if beside else rotate_pairs(x, table)


def _attention_of(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """float64 [1, h, 1, d] over [1, g, t, d] → [1, h * d]."""
    shared = queries.shape[1] // keys.shape[1]
    k, v = (kept.double().repeat_interleave(shared, dim=1) for kept in (keys, values))
    weights = (queries @ k.transpose(2, 3) * queries.shape[-1] ** -0.5).softmax(-1)
    found: Tensor = weights @ v
    return found.flatten(1)
