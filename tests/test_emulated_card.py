"""The stand-in for a card is as exact and as strict as the tests of the kernels need it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glmui.quant.kernels.cuda.driver import Function
from tests.emulated_card import EmulatedModule, FencedModule

KERNELS = """
#include "device.cuh"

KERNEL(convert, (const T *from, float *wide, T *back)) {
    const word i = blockIdx.x * blockDim.x + threadIdx.x;
    wide[i] = widen(from[i]);
    back[i] = narrow(wide[i]);
}
KERNEL(round_off, (const float *from, T *to)) {
    const word i = blockIdx.x * blockDim.x + threadIdx.x;
    to[i] = narrow(from[i]);
}
KERNEL(reverse, (float *x)) {
    SHARED(float, kept, 96);
    kept[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = kept[blockDim.x - 1 - threadIdx.x];
}
KERNEL(reverse_too_soon, (float *x)) {
    SHARED(float, kept, 96);
    kept[threadIdx.x] = x[threadIdx.x];
    x[threadIdx.x] = kept[blockDim.x - 1 - threadIdx.x];
}
KERNEL(exchange, (float *sums, float *firsts)) {
    sums[threadIdx.x] = warp_sum(threadIdx.x);
    firsts[threadIdx.x] = lane_at(threadIdx.x, 0);
}
KERNEL(two_barriers, (int some)) {
    if ((int)threadIdx.x < some) __syncthreads();
    else
        __syncthreads();
}
KERNEL(return_early, (int some)) {
    if ((int)threadIdx.x < some) return;
    __syncthreads();
}
KERNEL(fill_shared, (int count)) {
    DYNAMIC_SHARED(int, room);
    for (int i = 0; i < count; i++) room[i] = 0;
}
KERNEL(set_one, (float *x, int place)) { x[place] = 1; }
KERNEL_IN_BLOCKS(64, 1, narrow_block, (int nothing)) { (void)nothing; }
"""


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> EmulatedModule:
    source = tmp_path_factory.mktemp("kernels") / "small.cu"
    source.write_text(KERNELS)
    return EmulatedModule(Path(source))


def at(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def of_threads(function: Function, threads: int, *arguments: object, shared: int = 0) -> None:
    function((1, 1, 1), (threads, 1, 1), shared, arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bf16", torch.bfloat16)])
def test_all_numbers_of_16_bits_are_converted_as_torch_does(
    card: EmulatedModule, name: str, dtype: torch.dtype
) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide, back = torch.empty(len(numbers)), torch.empty_like(numbers)
    card.function(f"convert_{name}")((256, 1, 1), (256, 1, 1), 0, at(numbers, wide, back))
    is_number = ~numbers.isnan()
    assert torch.equal(wide[is_number], numbers.float()[is_number])
    assert torch.equal(back[is_number].view(torch.int16), numbers[is_number].view(torch.int16))
    assert wide[~is_number].isnan().all()
    assert back[~is_number].isnan().all()


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bf16", torch.bfloat16)])
def test_floats_are_rounded_as_torch_does(card: EmulatedModule, name: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 14,), generator=random).to(torch.int32)
    halfway = torch.arange(-(2**13), 2**13).short().view(torch.float16).float() * (1 + 2.0**-11)
    for floats in (bits.view(torch.float32).nan_to_num(), halfway.nan_to_num(), torch.randn(1 << 14)):
        rounded = torch.empty(len(floats), dtype=dtype)
        card.function(f"round_off_{name}")((len(floats) // 256, 1, 1), (256, 1, 1), 0, at(floats, rounded))
        assert torch.equal(rounded, floats.to(dtype))


def test_threads_meet_at_a_barrier(card: EmulatedModule) -> None:
    x = torch.arange(96.0)
    of_threads(card.function("reverse_half"), 96, *at(x))
    assert torch.equal(x, torch.arange(96.0).flip(0))


def test_a_missing_barrier_shows(card: EmulatedModule) -> None:
    x = torch.arange(96.0)
    of_threads(card.function("reverse_too_soon_half"), 96, *at(x))
    assert x.isnan().any()


@pytest.mark.parametrize("threads", [32, 96])
def test_lanes_exchange_values_within_their_warp(card: EmulatedModule, threads: int) -> None:
    sums, firsts = torch.empty(threads), torch.empty(threads)
    of_threads(card.function("exchange_half"), threads, *at(sums, firsts))
    warps = torch.arange(float(threads)).view(-1, 32)
    assert torch.equal(sums.view(-1, 32), warps.sum(1, keepdim=True).expand(-1, 32))
    assert torch.equal(firsts.view(-1, 32), warps[:, :1].expand(-1, 32))


def test_a_lane_that_is_not_there_has_no_number(card: EmulatedModule) -> None:
    sums, firsts = torch.empty(40), torch.empty(40)
    of_threads(card.function("exchange_half"), 40, *at(sums, firsts))
    assert sums[:32].eq(496).all()
    assert sums[32:].isnan().all()
    assert firsts[32:].eq(32).all()


@pytest.mark.parametrize("name", ["two_barriers", "return_early"])
def test_what_would_hang_a_card_is_told(card: EmulatedModule, name: str) -> None:
    function = card.function(f"{name}_half")
    with pytest.raises(RuntimeError, match=r"block \(0, 0, 0\) does not end: thread 0 .* thread 5 waits"):
        of_threads(function, 64, ctypes.c_int(5))
    of_threads(function, 64, ctypes.c_int(0))  # and the next launch is whole again


def test_shared_memory_ends_where_the_launch_says(card: EmulatedModule) -> None:
    function = card.function("fill_shared_half")
    of_threads(function, 1, ctypes.c_int(16), shared=64)
    with pytest.raises(RuntimeError, match="beyond its dynamic shared memory"):
        of_threads(function, 1, ctypes.c_int(17), shared=64)
    with pytest.raises(RuntimeError, match="more shared memory"):
        of_threads(function, 1, ctypes.c_int(1), shared=(48 << 10) + 16)


@pytest.mark.parametrize(("at_end", "outside"), [(True, 16), (False, -1)])
def test_memory_ends_where_the_tensor_does(card: EmulatedModule, at_end: bool, outside: int) -> None:
    function = FencedModule(card, {0: 64}, at_end).function("set_one_half")
    x = torch.zeros(16)
    for place in (0, 15):
        of_threads(function, 1, *at(x), ctypes.c_int(place))
    with pytest.raises(RuntimeError, match=r"thread 0 of block \(0, 0, 0\) left its memory"):
        of_threads(function, 1, *at(x), ctypes.c_int(outside))
    assert torch.equal(x.nonzero().flatten(), torch.tensor([0, 15]))


def test_arguments_are_those_of_the_kernel(card: EmulatedModule) -> None:
    function = card.function("fill_shared_half")
    with pytest.raises(RuntimeError, match="number of arguments"):
        of_threads(function, 1)
    with pytest.raises(RuntimeError, match="argument 0 has 8 bytes, its parameter 4"):
        of_threads(function, 1, ctypes.c_void_p())


def test_blocks_are_of_a_size_the_kernel_takes(card: EmulatedModule) -> None:
    function = card.function("narrow_block_half")
    of_threads(function, 64, ctypes.c_int())
    for threads in (0, 65, 1025):
        with pytest.raises(RuntimeError, match=r"no such block|more threads"):
            of_threads(function, threads, ctypes.c_int())


def test_only_what_is_there_is_found(card: EmulatedModule) -> None:
    for name in ("convert", "convert_float", "nothing_half"):
        with pytest.raises(KeyError):
            card.function(name)
