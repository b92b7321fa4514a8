"""The KV cache in eight bits, and memory that is taken before it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glmui.engine.chatglm import open_chatglm
from glmui.glm.cache import KVCache, Prefix, from_int8, in_int8
from glmui.glm.checkpoint import AnyModel, load_model
from glmui.types import EngineSpec, GenerationParams, Message
from tests.chatglm2_fixture import Folder
from tests.chatglm_fixture import goldens

LAYERS, HEADS, SIZE = 2, 3, 16


@pytest.fixture(autouse=True)
def _no_gradients_and_the_same_numbers_each_time() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def written(cache: KVCache, tokens: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Random keys and values, put behind what the cache holds; [batch, tokens, heads, size] each."""
    keys, values = torch.randn(2, batch, tokens, HEADS, SIZE)
    for layer in range(LAYERS):
        cache.write(layer, cache.length, keys, values)
    cache.length += tokens
    return keys, values


def assert_kept(cache: KVCache, keys: Tensor, values: Tensor) -> None:
    for layer in range(LAYERS):
        for kept, told in zip(cache.read(layer, cache.length), (keys, values), strict=True):
            step = told.abs().amax(-1, keepdim=True) / 127
            wrong = (kept[:, :, cache.front :].transpose(1, 2) - told).abs()
            assert kept.dtype == told.dtype
            assert (wrong <= 0.51 * step).all()


def test_each_value_is_kept_to_half_a_step_of_its_own_head_and_token() -> None:
    x = torch.randn(50, SIZE) * torch.logspace(-4, 4, 50)[:, None]
    q, scale = in_int8(x)
    assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float16, (50,))
    assert q.abs().amax() == 127
    wrong = (from_int8(q, scale, torch.float32) - x).abs() / x.abs().amax(-1, keepdim=True)
    assert wrong.max() < 0.51 / 127
    assert torch.equal(from_int8(*in_int8(torch.zeros(2, SIZE)), torch.float16), torch.zeros(2, SIZE).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_read_has_the_dtype_of_what_was_written(dtype: torch.dtype) -> None:
    cache = KVCache(1, 4, torch.int8)
    keys = torch.randn(1, 4, HEADS, SIZE, dtype=dtype)
    cache.write(0, 0, keys, keys)
    read, _ = cache.read(0, 4)
    assert read.dtype == dtype
    assert (read.transpose(1, 2) - keys).abs().max() < 0.03


@pytest.mark.parametrize("with_prefix", [False, True])
def test_it_grows_is_cut_and_is_reordered(with_prefix: bool) -> None:
    prefix = Prefix(torch.randn(2 * LAYERS, HEADS, 5, SIZE)) if with_prefix else None
    cache = KVCache(LAYERS, 3, torch.int8, prefix)
    keys, values = written(cache, 3)
    cache.make_room(20)
    more_keys, more_values = written(cache, 20)
    keys, values = torch.cat((keys, more_keys), 1), torch.cat((values, more_values), 1)
    assert_kept(cache, keys, values)
    cache.trim(7)
    cache.reorder(torch.tensor([1, 1]))
    assert_kept(cache, keys[[1, 1], :7], values[[1, 1], :7])
    if prefix:
        entries = prefix.of(1)[0]
        wrong = (cache.read(1, 0)[0] - entries).abs()
        assert (wrong <= 0.51 / 127 * entries.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("kept", [None, torch.float16, torch.int8])
def test_memory_taken_before_is_the_memory_that_is_used(kept: torch.dtype | None) -> None:
    cache = KVCache(LAYERS, 9, kept)
    rooms = [cache.take(layer, torch.empty(0), 2, HEADS, SIZE) for layer in range(LAYERS)]
    keys, _ = written(cache, 9)
    for layer, room in enumerate(rooms):
        assert cache.room(layer) is room
        assert room.keys.shape == (2, HEADS, 9, SIZE)
    read, _ = cache.read(0, 9)
    assert (read.transpose(1, 2) - keys).abs().max() < (0.03 if kept == torch.int8 else 2e-3)
    bytes_of_scales = 0 if rooms[0].key_scale is None else rooms[0].key_scale.nbytes
    assert (bytes_of_scales > 0) == (kept == torch.int8)
    with pytest.raises(ValueError, match="holds 9"):
        written(cache, 1)


def test_a_cache_grows_to_its_most_and_not_beyond() -> None:
    cache = KVCache(LAYERS, 4, torch.int8)
    cache.most = 10
    written(cache, 4)
    cache.make_room(1)
    assert cache.capacity == 10
    cache.make_room(40)  # what is asked for is given all the same
    assert cache.capacity == 44


def test_a_growth_that_fails_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(LAYERS, 4, torch.int8)
    keys, values = written(cache, 4)
    moved, calls = cache._moved, []

    def refuse(old: Tensor) -> Tensor:
        calls.append(old)
        if len(calls) == 6:  # in the second layer
            raise torch.OutOfMemoryError
        return moved(old)

    monkeypatch.setattr(cache, "_moved", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        cache.make_room(9)
    assert (cache.capacity, cache.length) == (4, 4)
    assert_kept(cache, keys, values)
    cache.make_room(9)
    more = written(cache, 9)
    assert_kept(cache, torch.cat((keys, more[0]), 1), torch.cat((values, more[1]), 1))


def steps(model: AnyModel, ids: list[int], following: list[int]) -> Tensor:
    """The logits [steps, vocab] of a reply that is given, step by step."""
    row = torch.tensor([ids])
    layout, cache = model.layout(row), model.new_cache(len(ids) + len(following))
    found = []
    for token in following:
        found.append(model(row, layout, cache, last_only=True)[0, -1])
        row = torch.tensor([[token]])
    return torch.stack(found)


@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "chatglm3"])
def test_a_reply_from_it_is_nearly_the_same(
    tiny_chatglm: Callable[[str], Path], tiny_chatglm2: Folder, family: str
) -> None:
    if family == "chatglm":
        case = goldens()["models"]["int4"]["prompts"][0]
        model, ids, following = load_model(tiny_chatglm("int4")), case["input_ids"], case["greedy_ids"]
    else:
        model, ids, following = load_model(tiny_chatglm2(family, "int4")), [64790, 64792, 790], [790] * 12
    exact = steps(model, ids, following)
    model.cache_dtype = torch.int8
    error = (steps(model, ids, following) - exact).abs()
    assert 0 < error.mean() < 0.02 * exact.std()


def test_the_setting_is_honoured_on_a_cpu(tiny_chatglm: Callable[[str], Path]) -> None:
    spec = EngineSpec("tiny", str(tiny_chatglm("int4")), device="cpu", kv_cache="int8")
    engine = open_chatglm(spec, lambda progress: None)
    *_, last = engine.stream_chat([Message("user", "hello")], GenerationParams(max_new_tokens=4), "1")
    assert last.tokens == 4
    assert engine.speaker is not None
    cache = engine.speaker.decoder.cache  # type: ignore[attr-defined]
    assert cache.room(0).keys.dtype == torch.int8
