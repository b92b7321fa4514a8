"""memory/model_size.py: the bytes it tells are those that torch's allocator gives out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from glmui.glm.cache import KVCache
from glmui.glm.chatglm2 import ChatGLM2Model
from glmui.glm.checkpoint import AnyModel, everything_on, load_model
from glmui.glm.config import AnyConfig, GLM2Config, GLMConfig, read_config
from glmui.glm.model import ChatGLMModel
from glmui.memory import model_size
from glmui.memory.model_size import CPU, ModelSize
from glmui.memory.published import SHAPES
from glmui.quant import linear, quantize

SMALL = GLMConfig(
    *(2000, 256, 1024, 1, 8), mask_token_id=1000, gmask_token_id=1001, bos_token_id=1002, eos_token_id=1003
)
SMALL2 = GLM2Config("chatglm2", 2000, 256, 512, 32, 1, 8, 2, 2048)
CACHES = {"auto": None, "fp16": torch.float16, "int8": torch.int8}


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch's allocator had given out at a time, of what this work took."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
        work()
    assert watched.profiler is not None
    most = now = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def model_of(config: AnyConfig, bits: int) -> AnyModel:
    model = ChatGLMModel(config) if isinstance(config, GLMConfig) else ChatGLM2Model(config)
    return (quantize(model, bits) if bits else model).eval()


@pytest.mark.parametrize(("bits", "cache"), [(0, "auto"), (0, "int8"), (4, "fp16")])
@pytest.mark.parametrize("config", [SMALL, SMALL2], ids=["chatglm", "chatglm2"])
def test_reading_a_prompt_takes_what_was_foretold(
    config: AnyConfig, bits: int, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A small matrix would fit into a single block, a real one does not.
    monkeypatch.setattr(linear, "rows_of", lambda columns: (1 << 15) // columns)
    monkeypatch.setattr(model_size, "_WIDENING_CPU", 0)
    model, size = model_of(config, bits), ModelSize.of(config, bits)
    model.cache_dtype = CACHES[cache]
    for count, piece in ((100, 1024), (500, 128)):
        model.piece = piece
        ids = torch.tensor([[5] * (count - 2) + [1001, 1002]])
        kept = model.new_cache(count)
        with torch.inference_mode():
            model(ids, model.layout(ids), kept, last_only=True)
            kept.trim(0)
            took = peak_bytes(lambda: model(ids, model.layout(ids), kept, last_only=True))  # noqa: B023
        foretold = size.scratch_bytes(CPU, count, cache, piece)
        assert took <= foretold <= 1.5 * took, (count, piece)


@pytest.mark.parametrize("kind", ["fp16", "int8", "int4"])
def test_weights_take_what_was_foretold(tiny_chatglm: Callable[[str], Path], kind: str) -> None:
    folder = tiny_chatglm(kind)
    model = load_model(folder, everything_on("cpu", torch.float32))
    size = ModelSize.of(read_config(folder))
    blocks = model.get_submodule(model.BLOCKS)
    assert sum(part.nbytes for part in blocks.parameters()) == size.layers * size.layer_bytes(CPU)
    table = model.get_submodule(model.EMBEDDING).get_parameter("weight").nbytes
    assert table + 2 * size.width * 4 == size.head_bytes(CPU, 16)


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
@pytest.mark.parametrize("kind", ["fp16", "int4"])
def test_so_do_those_of_the_later_families(
    tiny_chatglm2: Callable[[str, str], Path], family: str, kind: str
) -> None:
    folder = tiny_chatglm2(family, kind)
    model = load_model(folder, everything_on("cpu", torch.float32))
    size = ModelSize.of(read_config(folder))
    blocks = model.get_submodule(model.BLOCKS)
    assert sum(part.nbytes for part in blocks.parameters()) == size.layers * size.layer_bytes(CPU)
    tables = [
        model.get_submodule(name).get_parameter("weight").nbytes for name in (model.EMBEDDING, model.HEAD)
    ]
    assert 0 <= size.head_bytes(CPU, 16) - sum(tables) <= 8 * size.width


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("config", [SMALL, SMALL2], ids=["chatglm", "chatglm2"])
def test_keys_and_values_take_what_was_foretold(config: AnyConfig, cache: str) -> None:
    size, kept = ModelSize.of(config), KVCache(1, 300, CACHES[cache])
    room = kept.take(0, torch.zeros(1), 1, config.kv_heads, config.head_size)
    tensors = (room.keys, room.values, room.key_scale, room.value_scale)
    taken = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    assert taken == size.cache_bytes(CPU, 300, cache)


def test_a_quantised_head_takes_half_and_leaves_the_embedding_in_its_file() -> None:
    for name in ("chatglm-6b-int4", "chatglm2-6b-int4", "chatglm3-6b"):
        size = ModelSize.of(SHAPES[name])
        weights = size.vocab * size.width
        assert weights < size.head_bytes("cuda:0", 8) < 1.01 * weights
        assert size.embedding_apart(8)
        assert not size.embedding_apart(16)
    small_already = ModelSize.of(SHAPES["chatglm-6b-int4-qe"])
    assert not small_already.embedding_apart(8)
    assert small_already.head_bytes("cuda:0", 8) == small_already.head_bytes("cuda:0", 16)


def test_a_card_takes_float16_and_a_cpu_float32() -> None:
    half = ModelSize.of(SHAPES["chatglm-6b"])
    assert half.layer_bytes(CPU) == 2 * half.layer_bytes("cuda:0")
    exact = ModelSize.of(SHAPES["chatglm-6b"], card_float=4)
    assert exact.layer_bytes("cuda:0") == exact.layer_bytes(CPU)
    quantised = ModelSize.of(SHAPES["chatglm-6b-int4"])
    assert quantised.layer_bytes(CPU) < 1.1 * quantised.layer_bytes("cuda:0")
    assert quantised.mapped_bytes(28, True, 16) > quantised.mapped_bytes(1, False, 16) > 0
    assert half.mapped_bytes(28, False, 16) == 0


def test_the_groups_of_heads_share_one_mask_on_a_cpu_only() -> None:
    """A card computes the heads that share keys as one with more rows (glm/attention.py), and may copy the
    mask once more."""
    size = ModelSize.of(SHAPES["chatglm3-6b-int4"])
    few, many = (size.scratch_bytes("cuda:0", 8192, "fp16", piece) for piece in (256, 1024))
    assert many - few > 768 * 8192 * 16 * 5
