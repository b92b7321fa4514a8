"""The kernels between a block's linear layers, on an emulated card, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glmui.glm.cache import KVCache, Prefix, Room, from_int8, in_int8
from glmui.glm.rotary import rotate, rotate_pairs
from glmui.quant.kernels.cuda.block import AttentionScratch, BlockKernels, Turns, splits_of
from tests.emulated_card import EmulatedModule

ROUNDED = {
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}  # what rounding one result may cost, relative to its norm
DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def block() -> BlockKernels:
    return BlockKernels(EmulatedModule(), "emulated")


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 264), (3, 32), (1, 4096), (2, 8192)])
def test_layer_norm_of_a_sum(
    block: BlockKernels, random: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, residual = (3 * torch.randn(shape, generator=random).to(dtype) + 1 for _ in range(2))
    weight, bias = torch.randn(2, shape[-1], generator=random).to(dtype)
    whole = x.double() + 7.5 * residual.double()
    for source, got in (
        (x.double(), block.layer_norm(x, weight, bias, 1e-5)),
        (whole, block.layer_norm(x, weight, bias, 1e-5, residual, 7.5)),
    ):
        wanted = F.layer_norm(source, shape[-1:], weight.double(), bias.double(), 1e-5)
        assert got.shape == x.shape
        assert error(got, wanted) < ROUNDED[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 520)])
def test_rms_norm_gives_the_sum_too(
    block: BlockKernels, random: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, residual = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], generator=random).to(dtype)
    got, total = block.rms_norm(x, weight, 1e-5, residual)
    whole = x.double() + residual.double()
    assert error(total, whole) < ROUNDED[dtype]
    assert error(got, F.rms_norm(whole, shape[-1:], weight.double(), 1e-5)) < ROUNDED[dtype]
    alone, same = block.rms_norm(x, weight, 1e-5)
    assert same is x
    assert error(alone, F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5)) < ROUNDED[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 13, 700])
def test_activations(block: BlockKernels, random: torch.Generator, dtype: torch.dtype, columns: int) -> None:
    x = (5 * torch.randn(2, 2 * columns, generator=random)).to(dtype)
    wide = x.double()
    assert error(block.gelu(x), F.gelu(wide, approximate="tanh")) < ROUNDED[dtype]
    wanted = F.silu(wide[:, :columns]) * wide[:, columns:]
    assert error(block.swiglu(x), wanted) < ROUNDED[dtype]


def test_activations_of_very_large_numbers_are_finite(block: BlockKernels) -> None:
    x = torch.tensor([[-60000.0, 60000.0, -200.0, 200.0, 1.0, 1.0, 1.0, 1.0]]).half()
    assert block.gelu(x).tolist()[0][:4] == [0, 60000, 0, 200]
    assert block.swiglu(x).tolist() == [[0, 60000, 0, 200]]


class World:
    """One new token after others in a cache, and what float64 makes of it."""

    def __init__(
        self, heads: int, groups: int, size: int, tokens: int, dtype: torch.dtype, *, int8: bool = False,
        front: int = 0, spare: int = 5, side_by_side: bool = False,
    ) -> None:  # fmt: skip
        random = torch.Generator().manual_seed(heads * 1000 + tokens)
        prefix = Prefix(torch.randn(2, groups, front, size, generator=random)) if front else None
        self.cache = KVCache(1, tokens + spare, torch.int8 if int8 else None, prefix)
        before = torch.randn(2, 1, tokens - 1, groups, size, generator=random).to(dtype)
        self.cache.take(0, before, 1, groups, size)
        self.cache.write(0, 0, *before)
        width = (heads + 2 * groups) * size
        self.row = (2 * torch.randn(1, 1, width, generator=random)).to(dtype)
        angles = 6 * torch.rand(tokens + spare, size // 2 if side_by_side else size // 4, generator=random)
        place = torch.tensor([tokens - 1], dtype=torch.int32)
        self.turns = Turns(angles.cos().to(dtype), angles.sin().to(dtype), place, side_by_side)
        self.heads, self.groups, self.size, self.tokens, self.front = heads, groups, size, tokens, front

    @property
    def room(self) -> Room:
        return self.cache.room(0)

    def query_key_value(self) -> tuple[Tensor, Tensor, Tensor]:
        """[heads, d], [groups, d] twice, turned, in float64."""
        wide = self.row.double().flatten()
        cos, sin = (t[self.tokens - 1].double() for t in (self.turns.cosine, self.turns.sine))
        if self.turns.side_by_side:
            q, k, v = wide.view(1, 1, self.heads, 3, self.size).unbind(3)
            table = cos.view(1, 1, 1, 2, -1), sin.view(1, 1, 1, 2, -1)
            return rotate(q, table)[0, 0], rotate(k, table)[0, 0], v[0, 0]
        widths = [count * self.size for count in (self.heads, self.groups, self.groups)]
        q, k, v = (part.view(1, 1, -1, self.size) for part in wide.split(widths))
        table = cos.view(1, 1, 1, -1), sin.view(1, 1, 1, -1)
        return rotate_pairs(q, table)[0, 0], rotate_pairs(k, table)[0, 0], v[0, 0]

    def kept(self) -> tuple[Tensor, Tensor]:
        """All keys and values as they are in the room, [groups, t, d] float64."""
        end, room = self.front + self.tokens, self.room
        pairs = (room.keys, room.key_scale), (room.values, room.value_scale)
        keys, values = (x.double() if s is None else from_int8(x, s, torch.float64) for x, s in pairs)
        return keys[0, :, :end], values[0, :, :end]

    def wanted(self) -> Tensor:
        queries = self.query_key_value()[0]
        keys, values = (x.repeat_interleave(self.heads // self.groups, 0) for x in self.kept())
        scores = torch.einsum("hd,htd->ht", queries, keys) / math.sqrt(self.size)
        return torch.einsum("ht,htd->hd", scores.softmax(-1), values).flatten()

    def attend(self, block: BlockKernels, processors: int, scratch: AttentionScratch | None = None) -> Tensor:
        scratch = scratch or block.scratch(self.heads, self.room, processors)
        return block.attend(self.row, self.turns, self.room, self.front, scratch)


GLM6B, GLM2, ODD = (2, 2, 16), (8, 2, 16), (6, 2, 40)  # query heads, heads of keys, head size
REAL6B, REAL2 = (2, 2, 128), (8, 2, 128)  # of heads as large as in all published models


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("shape", "side_by_side"),
    [(GLM6B, True), (GLM2, False), (ODD, False), (REAL6B, True), (REAL2, False)],
)
@pytest.mark.parametrize("tokens", [1, 67, 300])
def test_attention_finds_what_float64_finds(
    block: BlockKernels,
    dtype: torch.dtype,
    int8: bool,
    shape: tuple[int, int, int],
    side_by_side: bool,
    tokens: int,
) -> None:
    world = World(*shape, tokens, dtype, int8=int8, side_by_side=side_by_side)
    got = world.attend(block, processors=4)
    assert got.shape == (1, 1, shape[0] * shape[2])
    assert error(got.flatten(), world.wanted()) < ROUNDED[dtype]


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_keeps_the_new_key_turned_and_the_value(
    block: BlockKernels, side_by_side: bool, dtype: torch.dtype
) -> None:
    world = World(*(GLM6B if side_by_side else GLM2), 70, dtype, side_by_side=side_by_side, front=3)
    before = world.room.changed(torch.clone)
    world.attend(block, processors=1)
    _, key, value = world.query_key_value()
    assert error(world.room.keys[0, :, 72], key) < ROUNDED[dtype]
    assert torch.equal(world.room.values[0, :, 72].double(), value)
    for old, new in ((before.keys, world.room.keys), (before.values, world.room.values)):
        assert torch.equal(old[:, :, :72], new[:, :, :72])  # and nothing else
        assert torch.equal(old[:, :, 73:].view(torch.int16), new[:, :, 73:].view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_keeps_in_int8_what_torch_would(block: BlockKernels, dtype: torch.dtype) -> None:
    world = World(*ODD, 9, dtype, int8=True)
    world.row[..., -ODD[2] :] = 0  # the last group's value: nothing to scale by
    world.attend(block, processors=1)
    _, key, value = world.query_key_value()
    stored, scale = in_int8(value.to(dtype))
    assert torch.equal(world.room.values[0, :, 8], stored)
    assert torch.equal(world.room.value_scale[0, :, 8], scale)
    stored, scale = in_int8(key.to(dtype))
    assert error(world.room.key_scale[0, :, 8], scale) < ROUNDED[dtype]
    assert (world.room.keys[0, :, 8].int() - stored.int()).abs().max() <= 1  # a key is rounded before


@pytest.mark.parametrize("shape", [GLM6B, GLM2, REAL6B, REAL2])
@pytest.mark.parametrize("tokens", [63, 64, 65, 128, 129, 700])
def test_splits_put_together_what_one_block_finds(
    block: BlockKernels, shape: tuple[int, int, int], tokens: int
) -> None:
    """One scratch serves token after token, as in a graph, whatever the number of splits that are needed."""
    worlds = [World(*shape, count, torch.float16, spare=700 - count) for count in (tokens, 700, tokens)]
    scratch = block.scratch(shape[0], worlds[0].room, processors=40)
    assert scratch.parts.shape[1] == 11
    for world in worlds:
        assert error(world.attend(block, 40, scratch).flatten(), world.wanted()) < 5e-4


def test_a_prefix_is_looked_at_too(block: BlockKernels) -> None:
    world = World(*GLM2, 66, torch.float16, front=130)
    assert error(world.attend(block, 8).flatten(), world.wanted()) < 5e-4


def test_scores_far_apart_stay_numbers(block: BlockKernels) -> None:
    world = World(*GLM6B, 200, torch.float16, side_by_side=True)
    world.row *= 60  # scores beyond what exp could take
    world.room.keys[0, :, 40] *= 50
    assert error(world.attend(block, 8).flatten(), world.wanted()) < 2e-3


@pytest.mark.parametrize(
    ("tiles", "tokens", "processors", "wanted"),
    [(32, 2048, 132, 9), (32, 2048, 28, 2), (8, 2048, 132, 32), (32, 100, 132, 2), (32, 1, 28, 1)],
)
def test_splits_fill_a_card(tiles: int, tokens: int, processors: int, wanted: int) -> None:
    assert splits_of(tiles, tokens, processors) == wanted


def test_what_kernels_cannot_take_is_refused(block: BlockKernels) -> None:
    x, weight = torch.zeros(1, 16, dtype=torch.float16), torch.ones(16, dtype=torch.float16)
    world = World(*GLM6B, 5, torch.float16, side_by_side=True)
    scratch = block.scratch(2, world.room, 1)
    row, turns, room = world.row, world.turns, world.room
    wide = Turns(turns.cosine.float(), turns.sine, turns.place, side_by_side=True)
    elsewhere = Turns(turns.cosine, turns.sine, turns.place.long(), side_by_side=True)
    two = Room(*(x.expand(2, -1, -1, -1) for x in (room.keys, room.values)), None, None, room.dtype)
    for refused in (
        lambda: block.layer_norm(x.float(), weight, weight, 1e-5),
        lambda: block.layer_norm(x, weight.bfloat16(), weight, 1e-5),
        lambda: block.layer_norm(x, weight, weight, 1e-5, x[:, :8]),
        lambda: block.rms_norm(x[:, :12], weight[:12], 1e-5),
        lambda: block.rms_norm(torch.zeros(1, 8200).half(), torch.zeros(8200).half(), 1e-5),
        lambda: block.gelu(torch.zeros(4, 4).half().t()),
        lambda: block.swiglu(x[:, :15]),
        lambda: block.attend(row[..., :-1], turns, room, 0, scratch),
        lambda: block.attend(row, wide, room, 0, scratch),
        lambda: block.attend(row, elsewhere, room, 0, scratch),
        lambda: block.attend(row, turns, two, 0, scratch),
        lambda: block.attend(row.bfloat16(), turns, room, 0, scratch),
        lambda: block.attend(row, turns, room, 0, AttentionScratch(scratch.parts[:1], scratch.tickets)),
    ):
        with pytest.raises(ValueError, match=r"wanted|no |cannot"):
            refused()


def test_which_numbers_there_are_kernels_for(block: BlockKernels) -> None:
    assert block.takes(torch.float16)
    assert block.takes(torch.bfloat16)
    assert not block.takes(torch.float32)
