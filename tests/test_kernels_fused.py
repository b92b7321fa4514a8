"""Attention, rotary positions and activation in C: of every target against float64, and inside a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glmui.engine.chatglm import open_chatglm
from glmui.engine.loaded import kernel_folder
from glmui.glm.attention import Attention
from glmui.glm.cache import KVCache
from glmui.glm.checkpoint import load_model
from glmui.glm.layout import Layout, pad_left
from glmui.glm.model import ChatGLMModel
from glmui.glm.rotary import rotary_table, rotate
from glmui.quant.fast import use_kernels
from glmui.quant.fused import ATTENTION_ROWS, KernelAttention, KernelGelu, KernelRotate
from glmui.quant.kernels.cpu import Kernels, Numerics, load
from glmui.quant.kernels.cpu.check import attention, error
from glmui.quant.kernels.cpu.native import Library
from glmui.types import EngineSpec
from tests.chatglm_fixture import KINDS, goldens

KEPT = (torch.float32, torch.float16, torch.bfloat16)
EXACT = 3e-6
CLOSE_CALL = 5e-3  # a step whose two best logits are nearer may go the other way


@pytest.fixture(scope="module")
def targets() -> list[Kernels]:
    """The kernels of every target this processor runs."""
    if load(kernel_folder()).kernels is None:
        pytest.skip("no kernels on this machine")
    names = Library(next(kernel_folder().glob("kernels-*.*"))).targets()
    loaded = [load(kernel_folder(), threads=2, target=name).kernels for name in names]
    return [kernels for kernels in loaded if kernels]


@pytest.fixture(scope="module")
def kernels(targets: list[Kernels]) -> Kernels:
    return targets[0]


@pytest.fixture(autouse=True)
def _no_gradients_and_the_same_numbers_each_time() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def cached(batch: int, groups: int, tokens: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as a cache with room to spare gives them."""
    cache = KVCache(1, tokens + 5, dtype)
    cache.write(0, 0, *torch.randn(2, batch, tokens, groups, size))
    return cache.read(0, tokens)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    heads=st.integers(1, 5),
    size=st.sampled_from((16, 32, 80, 128, 144)),
    tokens=st.integers(1, 300),
    dtype=st.sampled_from(KEPT),
    masked=st.booleans(),
)
def test_any_shape_of_attention_is_right(
    targets: list[Kernels], batch: int, rows: int, groups: int, heads: int, size: int, tokens: int,
    dtype: torch.dtype, masked: bool,
) -> None:  # fmt: skip
    keys, values = cached(batch, groups, tokens, size, dtype)
    queries = 2 * torch.randn(batch, rows, groups * heads, size)
    visible = torch.rand(batch, 1, rows, tokens) < 0.5 if masked else None
    if visible is not None:
        visible[..., torch.randint(tokens, ())] = True  # each row sees something
    wanted = attention(queries.double(), keys.double(), values.double(), visible)
    assert error(Attention()(queries, keys, values, visible), wanted) < 1e-5
    for kernels in targets:
        assert error(kernels.attend(queries, keys, values, visible), wanted) < EXACT, kernels.name


def test_long_contexts_and_large_scores(targets: list[Kernels]) -> None:
    for kernels, dtype in product(targets, KEPT):
        keys, values = cached(1, 2, 1500, 64, dtype)
        queries = 40 * torch.randn(1, 1, 32, 64)  # scores in the hundreds: all weight on one token
        wanted = attention(queries.double(), keys.double(), values.double(), None)
        assert error(kernels.attend(queries, keys, values), wanted) < 1e-4, kernels.name


def test_a_broken_number_is_not_hidden(kernels: Kernels) -> None:
    for broken in (float("nan"), float("inf")):
        keys, values = cached(1, 2, 40, 32, torch.float32)
        keys[0, 1, 7, 3] = broken
        found = kernels.attend(torch.ones(1, 1, 2, 32), keys, values)
        assert found[0, 0, 0].isfinite().all()
        assert not found[0, 0, 1].isfinite().any()


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_finds_the_same(kernels: Kernels, threads: int) -> None:
    other = load(kernel_folder(), threads=threads).kernels
    assert other
    for groups in (2, 32):
        keys, values = cached(1, groups, 700, 32, torch.float16)
        queries = torch.randn(1, 1, 32, 32)
        assert torch.equal(kernels.attend(queries, keys, values), other.attend(queries, keys, values))


def test_what_attention_cannot_take_is_refused(kernels: Kernels) -> None:
    keys, values = cached(1, 2, 9, 32, torch.float16)
    ask = partial(kernels.attend, torch.ones(1, 1, 4, 32))
    for wrong in ((keys[..., :16], values), (keys, values.float()), (keys, values[:, :, :8])):
        with pytest.raises(ValueError, match="cannot"):
            ask(*wrong)
    with pytest.raises(ValueError, match="cannot"):
        ask(keys.double(), values.double())
    with pytest.raises(ValueError, match="cannot"):
        ask(keys.transpose(2, 3).contiguous().transpose(2, 3), values)
    with pytest.raises(ValueError, match="cannot"):
        kernels.attend(torch.ones(1, 1, 3, 32), keys, values)


def test_activation_and_positions(targets: list[Kernels]) -> None:
    x = torch.cat([torch.linspace(-60, 60, 5001), torch.tensor([0.0, 1e-30, 3e4, -3e4, 1e30])])
    positions = torch.randint(0, 2000, (2, 2, 3))
    table = rotary_table(positions, 16, torch.float32)
    heads = torch.randn(2, 3, 4, 3 * 16).chunk(3, dim=-1)[1]  # a part of something
    for kernels in targets:
        gelu = torch.nn.functional.gelu(x.double(), approximate="tanh")
        torch.testing.assert_close(KernelGelu(kernels)(x.clone()).double(), gelu, rtol=1e-5, atol=1e-6)
        wanted = rotate(heads, table)
        rows = torch.zeros(2, 3, 4, 48)
        rows[..., 16:32] = heads
        torch.testing.assert_close(KernelRotate(kernels)(rows[..., 16:32], table), wanted)
        assert (rows[..., :16] == 0).all()
        assert (rows[..., 32:] == 0).all()
    with pytest.raises(ValueError, match="cannot turn"):
        targets[0].rotate(heads.transpose(1, 2), *table)
    assert KernelGelu(targets[0])(torch.ones(0, 4)).shape == (0, 4)
    half = torch.randn(3, 8).bfloat16()
    assert KernelGelu(targets[0])(half).dtype == torch.bfloat16  # torch's own


def test_long_prompts_stay_with_torch(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    seam = KernelAttention(kernels)
    real = kernels.attend

    def attend(queries: Tensor, *rest: Tensor) -> Tensor:
        rows.append(queries.shape[1])
        return real(queries, *rest)

    monkeypatch.setattr(kernels, "attend", attend)
    keys, values = cached(1, 2, 40, 32, torch.float16)
    for count in (1, ATTENTION_ROWS, ATTENTION_ROWS + 1, 33):
        queries = torch.randn(1, count, 4, 32)
        wanted = attention(queries.double(), keys.double(), values.double(), None)
        assert error(seam(queries, keys, values), wanted) < 1e-5
    assert rows == [1, ATTENTION_ROWS]


class Answers:
    """What a model says to the goldens' prompts, fed with the golden ids."""

    def __init__(self, model: ChatGLMModel) -> None:
        self._model = model

    def of(self, case: dict[str, list[int]]) -> Tensor:
        """Logits [steps, vocabulary]."""
        ids = torch.tensor([case["input_ids"]])
        layout, cache = Layout.of(ids, self._model.config), self._model.new_cache(ids.shape[1] + 40)
        logits = []
        for golden in case["greedy_ids"]:
            logits.append(self._model(ids, layout, cache, last_only=True)[0, 0])
            ids = torch.tensor([[golden]])
        return torch.stack(logits)


def with_kernels(
    folder: Path, kernels: Kernels, numerics: Numerics, kept: torch.dtype | None
) -> ChatGLMModel:
    model = load_model(folder)
    assert isinstance(model, ChatGLMModel)
    use_kernels(model, kernels, numerics)
    model.cache_dtype = kept
    return model


@pytest.mark.parametrize("most", [4, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp16"])
@pytest.mark.parametrize(
    ("numerics", "kept", "close"),
    [("exact", None, 1e-3), ("balanced", None, CLOSE_CALL), ("balanced", torch.float16, CLOSE_CALL)],
)
def test_published_greedy_ids(
    tiny_chatglm: Callable[[str], Path], kernels: Kernels, kind: str, numerics: Numerics,
    kept: torch.dtype | None, close: float, most: int | None,
) -> None:  # fmt: skip
    answers = Answers(with_kernels(tiny_chatglm(kind), kernels, numerics, kept))
    for case in goldens()["models"][kind]["prompts"][:most]:
        best = answers.of(case).argmax(-1).tolist()
        for got, golden, gap in zip(best, case["greedy_ids"], case["greedy_gaps"], strict=True):
            assert got == golden or gap < close, case["name"]


def test_a_padded_batch_with_kernels(tiny_chatglm: Callable[[str], Path], kernels: Kernels) -> None:
    case = goldens()["models"]["int4"]["batch"]
    model = with_kernels(tiny_chatglm("int4"), kernels, "exact", torch.float16)
    ids, pads = pad_left([[i for i in row if i != 3] for row in case["input_ids"]], model.config)
    layout, cache = Layout.of(ids, model.config, pads), model.new_cache(ids.shape[1] + 8)
    plain = load_model(tiny_chatglm("int4"))
    unkept = plain.new_cache(ids.shape[1] + 8)
    for step in range(6):
        logits, wanted = model(ids, layout, cache)[:, -1], plain(ids, layout, unkept)[:, -1]
        assert (logits - wanted).abs().max() < 0.02
        ids = wanted.argmax(-1)[:, None] if step else ids[:, -1:]


@pytest.mark.parametrize("kept", KEPT)
def test_a_cache_keeps_its_dtype_and_its_numbers(kept: torch.dtype) -> None:
    cache = KVCache(2, 3, kept)
    first, more = torch.randn(2, 1, 2, 4, 16), torch.randn(2, 1, 1, 4, 16)
    cache.write(0, 0, *first)
    cache.length = 2
    cache.make_room(40)
    cache.write(0, 2, *more)
    keys, values = cache.read(0, 3)
    assert keys.dtype == values.dtype == kept
    written = torch.cat([first, more], dim=2).transpose(2, 3).to(kept)
    assert torch.equal(keys, written[0])
    assert torch.equal(values, written[1])
    cache.reorder(torch.tensor([0, 0]))
    assert cache.read(0, 3)[0].shape[0] == 2
    assert cache.read(0, 3)[0].dtype == kept


@pytest.mark.parametrize(
    ("asked", "numerics", "kept"),
    [
        ("auto", "balanced", torch.float16),
        ("auto", "exact", torch.float32),
        ("fp32", "fast", torch.float32),
        ("bf16", "exact", torch.bfloat16),
    ],
)
def test_the_setting_decides_what_the_cache_keeps(
    tiny_chatglm: Callable[[str], Path], asked: Any, numerics: Numerics, kept: torch.dtype
) -> None:
    spec = EngineSpec("tiny", str(tiny_chatglm("int4")), "cpu", kv_cache=asked, cpu_precision=numerics)
    engine = open_chatglm(spec, lambda progress: None)
    assert engine.speaker
    model = engine.speaker.decoder.model  # type: ignore[attr-defined]
    cache = model.new_cache(8)
    model(torch.tensor([[5, 300, model.config.gmask_token_id, model.config.bos_token_id]]), cache=cache)
    assert cache.read(0, 4)[0].dtype == kept
