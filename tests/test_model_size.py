"""memory/model_size.py: the bytes it tells are those that torch's allocator gives out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from glmui.engine.placement import cache_dtype
from glmui.glm.adapter import Adapter, attach
from glmui.glm.cache import KVCache, Prefix
from glmui.glm.chatglm2 import ChatGLM2Model
from glmui.glm.checkpoint import AnyModel, everything_on, load_model
from glmui.glm.config import AnyConfig, GLM2Config, GLMConfig, read_config
from glmui.glm.model import ChatGLMModel
from glmui.memory import model_size
from glmui.memory.fitting import request_of
from glmui.memory.model_size import CPU, ModelSize, matrices
from glmui.memory.published import SHAPES
from glmui.quant import linear, quantize
from glmui.types import EngineSpec

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


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("config", [SMALL, SMALL2], ids=["chatglm", "chatglm2"])
def test_so_it_does_beside_a_prefix_and_an_adapter(
    config: AnyConfig, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "rows_of", lambda columns: (1 << 15) // columns)
    monkeypatch.setattr(model_size, "_WIDENING_CPU", 0)
    model, count, front = model_of(config, bits), 500, 128
    model.piece, model.cache_dtype = 128, torch.float16
    model.prefix = Prefix(torch.zeros(2, config.kv_heads, front, config.head_size))
    shapes = matrices(config)
    attach(model, Adapter({name: _pair(*shapes[part]) for name, part in linears(model)}))
    size = ModelSize.of(config, bits).with_extras(front, sum(4 * sum(shape) for shape in shapes.values()))
    ids = torch.tensor([[5] * (count - 2) + [1001, 1002]])
    kept = model.new_cache(count)
    with torch.inference_mode():
        model(ids, model.layout(ids), kept, last_only=True)
        kept.trim(0)
        took = peak_bytes(lambda: model(ids, model.layout(ids), kept, last_only=True))
    foretold = size.scratch_bytes(CPU, count, "fp16", 128)
    assert took <= foretold <= 1.5 * took


def linears(model: AnyModel) -> list[tuple[str, str]]:
    """Names of the blocks' linear layers, and which part each is."""
    inside = [(name, name.rpartition(".")[2]) for name, _ in model.named_modules() if ".layers." in name]
    return [(name, part) for name, part in inside if part in matrices(model.config)]


def _pair(rows: int, columns: int, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rank, columns), torch.zeros(rows, rank)


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


def test_fp32_keeps_what_a_layer_computes_in() -> None:
    """Which on a card is float16: so the engine keeps it, and so it is counted."""
    size = ModelSize.of(SHAPES["chatglm-6b-int4"])
    exact = EngineSpec("", "", kv_cache="fp32")
    assert cache_dtype(exact) is None
    asked = request_of(exact).kv_cache
    assert size.cache_bytes("cuda:0", 100, asked) == size.cache_bytes("cuda:0", 100, "fp16")
    assert size.cache_bytes(CPU, 100, asked) == 2 * size.cache_bytes(CPU, 100, "fp16")
    room = KVCache(1, 300, cache_dtype(exact)).take(0, torch.zeros(1, dtype=torch.float16), 1, 2, 8)
    assert room.keys.dtype == torch.float16


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
