"""A card's kernels as layers of a model, on an emulated card: the same numbers, a small scratch, one copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glmui.engine import cards, chatglm
from glmui.engine.card_step import CardStep, can_step
from glmui.engine.chatglm import open_chatglm
from glmui.engine.decoders import ChatGLMDecoder, Held, decoder_of
from glmui.engine.loaded import LoadedEngine
from glmui.engine.placement import Placement
from glmui.errors import InvalidInput
from glmui.glm.checkpoint import AnyModel, everything_on, load_model
from glmui.glm.config import GLMConfig
from glmui.memory import model_size
from glmui.memory.model_size import ModelSize
from glmui.memory.plan import Plan, plan
from glmui.memory.plan_request import CUDA_CONTEXT, GIB, Machine, PlanRequest, budget
from glmui.memory.published import SHAPES
from glmui.quant import QuantizedLinear, quantize
from glmui.quant.kernels.cuda import Loaded
from glmui.quant.kernels.cuda.block import BlockKernels
from glmui.quant.kernels.cuda.native import MOST_ROWS, CardKernels
from glmui.quant.on_card import (
    ROOMY,
    SCRATCH,
    CardLinear,
    head_in_int8,
    scratch_bytes,
    scratch_on,
    use_card_kernels,
)
from glmui.types import ChatEngine, EngineSpec, GenerationParams, Message, Progress
from tests.chatglm2_fixture import Folder
from tests.chatglm_fixture import goldens
from tests.emulated_card import EmulatedModule

CARD = torch.device("cpu")  # where the emulated card's tensors are
TOLERANCE = 6e-2
NO_KERNELS = Loaded(None, None, "reasons.card_kernels_old_card")
Model = Callable[[str, str], AnyModel]


@pytest.fixture(autouse=True)
def _no_gradients_and_the_same_numbers_each_time() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture
def kernels() -> CardKernels:
    return CardKernels(EmulatedModule(), "emulated")


@pytest.fixture
def opened(tiny_chatglm: Callable[[str], Path], tiny_chatglm2: Folder) -> Model:
    """A tiny model by family and kind, in float16 as on a card."""

    def open_model(family: str, kind: str) -> AnyModel:
        folder = tiny_chatglm(kind) if family == "chatglm" else tiny_chatglm2(family, kind)
        return load_model(folder, everything_on(CARD, torch.float16), family=family)

    return open_model


def layer(bits: int, bias: bool = True, group_size: int | None = None) -> QuantizedLinear:
    linear = nn.Linear(128, 72, bias=bias, dtype=torch.float16)
    return QuantizedLinear.of(linear, bits, group_size)


def swapped(plain: nn.Module, kernels: CardKernels) -> nn.Module:
    model = nn.Sequential(plain)
    use_card_kernels(model, {CARD: kernels})
    return model[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_few_rows_and_many_give_the_same(
    kernels: CardKernels, bits: int, group_size: int | None, dtype: torch.dtype
) -> None:
    plain = layer(bits, True, group_size)
    plain.bias = nn.Parameter(plain.bias.to(dtype), requires_grad=False)  # type: ignore[union-attr]
    card = swapped(plain, kernels)
    wide = deepcopy(plain).float()
    assert isinstance(card, CardLinear)
    for rows in (1, MOST_ROWS, MOST_ROWS + 1, 40):
        x = torch.randn(1, rows, 128, dtype=dtype)
        wanted = wide(x.float())
        error = (card(x).float() - wanted).norm() / wanted.norm()
        assert error < (2e-3 if dtype == torch.float16 else 1.5e-2)
        assert card(x).dtype == dtype


def test_a_swapped_layer_has_the_same_tensors(kernels: CardKernels) -> None:
    plain = layer(4)
    card = swapped(plain, kernels)
    assert dict(card.named_parameters()).items() == dict(plain.named_parameters()).items()
    assert str(card).startswith("CardLinear(in_features=128")


def test_float32_is_computed_as_before(kernels: CardKernels) -> None:
    plain = layer(4).float()
    plain.weight_scale.data = plain.weight_scale.half()
    x = torch.randn(3, 128)
    assert torch.equal(swapped(plain, kernels)(x), plain(x))


def test_what_the_kernels_cannot_take_stays(kernels: CardKernels) -> None:
    wide_scale = layer(8).float()
    assert swapped(wide_scale, kernels) is wide_scale
    elsewhere = layer(4)
    model = nn.Sequential(elsewhere)
    use_card_kernels(model, {torch.device("cuda:1"): kernels})
    assert model[0] is elsewhere


class Widened:
    """Kernels that tell how many rows they widen at a time."""

    def __init__(self, kernels: CardKernels) -> None:
        self._kernels = kernels
        self.rows: list[int] = []

    def takes(self, dtype: torch.dtype) -> bool:
        return self._kernels.takes(dtype)

    def widen(self, weight: Tensor, scale: Tensor, bits: int, out: Tensor) -> None:
        self.rows.append(len(weight))
        self._kernels.widen(weight, scale, bits, out)


def test_many_rows_take_a_small_scratch_and_no_whole_matrix(
    kernels: CardKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmui.quant.on_card.SCRATCH", 20 * 2 * 128)
    plain, telling = layer(4), Widened(kernels)
    x = torch.randn(20, 128).half()
    got = swapped(plain, telling)(x)  # type: ignore[arg-type]
    assert telling.rows == [20, 20, 20, 12]
    assert (got - plain(x)).abs().max() < 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [20, 72])
def test_every_slice_lands_in_its_place(
    kernels: CardKernels, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool, rows: int
) -> None:
    """A matrix that fits the scratch is one slice; nothing but the product itself is then written."""
    monkeypatch.setattr("glmui.quant.on_card.SCRATCH", rows * 2 * 128)
    plain, telling = layer(8, bias), Widened(kernels)
    if bias:
        plain.bias = nn.Parameter(plain.bias.to(dtype), requires_grad=False)  # type: ignore[union-attr]
    x = torch.randn(2, 9, 128).to(dtype)
    got, wanted = swapped(plain, telling)(x), deepcopy(plain).float()(x.float())  # type: ignore[arg-type]
    assert telling.rows == ([20, 20, 20, 12] if rows == 20 else [72])
    assert got.shape == (2, 9, 72)
    assert (got.float() - wanted).norm() / wanted.norm() < (2e-3 if dtype == torch.float16 else 1.5e-2)


@pytest.mark.parametrize(
    ("total", "part", "wanted"),
    [(6, 0.9, SCRATCH), (8, 1, SCRATCH), (80, 0.07, SCRATCH), (12, 0.9, 4 * SCRATCH), (80, 1, 4 * SCRATCH)],
)
def test_a_large_card_gives_a_larger_scratch(
    monkeypatch: pytest.MonkeyPatch, total: int, part: float, wanted: int
) -> None:
    """Of what torch may take there: a large card that shall behave as a small one does so here, too."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total * GIB)
    )
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: part)
    assert scratch_on(torch.device("cuda:0")) == wanted
    with torch.device("meta"):
        large = QuantizedLinear.of(nn.Linear(16384, 4096), 4)
        assert scratch_bytes(large, most=2**30) == 2 * 16384 * 4096
        assert scratch_bytes(large, most=wanted) == min(wanted, 2 * 16384 * 4096)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_plans_count_the_scratch(name: str, bits: int) -> None:
    """Or leave room for more of it, where more is taken, beside the longest context."""
    size = ModelSize.of(SHAPES[name], bits)
    context = PlanRequest("cuda", context=size.positions)
    assert model_size._WIDENING == SCRATCH
    roomy = Machine((ROOMY - cards._LOST + CUDA_CONTEXT + context.vram_reserve,), 32 * GIB)
    found = plan(size, roomy, context)
    assert found.vram - SCRATCH + 4 * SCRATCH <= budget(roomy, context, "cuda:0")


class NoBfloat16(EmulatedModule):
    """The kernels of a card before compute capability 8.0."""

    def function(self, name: str) -> Any:
        if name.endswith("bf16"):
            raise KeyError(name)
        return super().function(name)


def test_numbers_without_kernels_are_computed_by_torch() -> None:
    plain = layer(4)
    plain.bias = nn.Parameter(plain.bias.bfloat16(), requires_grad=False)  # type: ignore[union-attr]
    card = swapped(plain, CardKernels(NoBfloat16(), "sm_75"))
    for rows in (1, 40):
        x = torch.randn(rows, 128).bfloat16()
        assert torch.equal(card(x), plain(x))


def test_the_scratch_is_bounded_unless_whole_matrices_are_asked_for() -> None:
    with torch.device("meta"):
        large = [QuantizedLinear.of(nn.Linear(16384, 4096), 4), QuantizedLinear.of(nn.Linear(32, 32), 4)]
        assert scratch_bytes(*large) == SCRATCH
        assert scratch_bytes(large[1]) == 2 * 32 * 32
        assert scratch_bytes(QuantizedLinear.of(nn.Linear(SCRATCH, 2), 4)) == 2 * SCRATCH  # one row at least
        asked = quantize(nn.Sequential(nn.Linear(16384, 4096)), 4, use_quantization_cache=True)[0]
        assert isinstance(asked, QuantizedLinear)
        assert scratch_bytes(asked, large[1]) == 2 * 16384 * 4096


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("kept", [None, torch.int8])
def test_a_reply_is_the_plain_models(
    opened: Model,
    kernels: CardKernels,
    tiny_chatglm: Callable[[str], Path],
    kind: str,
    kept: torch.dtype | None,
) -> None:
    """Prompt and steps of a ChatGLM-6B by all of a card's ways, held against float32."""
    case = goldens()["models"][kind]["prompts"][0]
    check_reply("chatglm", kind, kept, case["input_ids"], case["greedy_ids"][:6], opened, kernels)


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
@pytest.mark.parametrize("kept", [None, torch.int8])
def test_a_reply_is_the_plain_models_too(
    opened: Model, kernels: CardKernels, family: str, kept: torch.dtype | None
) -> None:
    ids = [64790, 64792, *range(300, 312)]
    check_reply(family, "int4", kept, ids, [790, 30951, 517, 30910], opened, kernels)


def check_reply(
    family: str,
    kind: str,
    kept: torch.dtype | None,
    ids: list[int],
    following: list[int],
    opened: Model,
    kernels: CardKernels,
) -> None:
    plain = decoder_of(opened(family, kind).float())
    model = opened(family, kind)
    model.cache_dtype = kept
    use_card_kernels(model, {CARD: kernels})
    assert sum(isinstance(m, CardLinear) for m in model.modules()) == 4 * model.config.num_layers
    block = BlockKernels(EmulatedModule(), "emulated")
    assert can_step(model, block)
    card = decoder_of(model, Held(planned=64), CardStep(model, block, record=None))
    wide = 4 if kept == torch.int8 else 1  # of the tolerance
    wanted, got = plain.prefill(ids, ignore), card.prefill(ids, ignore)
    assert (got.float() - wanted).abs().max() < wide * TOLERANCE
    for token in following:
        wanted, got = plain.step(token), card.step(token)
        assert (got.float() - wanted).abs().max() < wide * TOLERANCE


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_the_head_in_eight_bits_leaves_the_embedding_where_it_is(
    opened: Model, kernels: CardKernels, family: str
) -> None:
    plain, model = opened(family, "int4"), opened(family, "int4")
    table = model.get_submodule(model.EMBEDDING).get_parameter("weight")
    before = table.clone()
    head = model.get_submodule(model.HEAD)
    assert isinstance(head, nn.Linear)
    model.set_submodule(model.HEAD, head_in_int8(head, CARD))
    ids = torch.tensor([[5, 20, 130001, 130004] if family == "chatglm" else [64790, 64792, 790]])
    wanted, got = plain(ids, last_only=True), model(ids, last_only=True)
    assert 0 < (got - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert torch.equal(model.get_submodule(model.EMBEDDING).get_parameter("weight"), before)
    assert model.get_submodule(model.HEAD).get_parameter("weight").dtype == torch.int8


# The whole engine


def planned(vram: int, reserve: int = 500_000_000) -> Plan:
    config = GLMConfig(130528, 4096, 16384, 28, 32, quantization_bit=4)
    return plan(ModelSize.of(config), Machine((vram,), 16 * GIB), PlanRequest("cuda", vram_reserve=reserve))


@pytest.fixture
def engine_on(monkeypatch: pytest.MonkeyPatch, tiny_chatglm: Callable[[str], Path]) -> Callable[..., Any]:
    """Opens the tiny ChatGLM-6B on the emulated card, with room for so many tokens."""
    loaded = Loaded(
        CardKernels(EmulatedModule(), "sm_86"),
        BlockKernels(EmulatedModule(), "sm_86"),
        "reasons.card_kernels",
    )

    def open_engine(room: int = 512, found: Loaded = loaded, **wishes: Any) -> ChatEngine:
        where = Placement(
            everything_on(CARD, torch.float16),
            "cuda:0",
            torch.float16,
            "reasons.card_float16",
            planned(6 * GIB),
            room,
            8,
        )
        monkeypatch.setattr(chatglm, "placement", lambda spec, config: where)
        monkeypatch.setattr(cards, "limit_memory", lambda plan: None)
        monkeypatch.setattr(cards, "open_cards", lambda *_: cards.Cards({CARD: found}))
        monkeypatch.setattr(cards, "CardStep", partial(CardStep, record=None))
        spec = EngineSpec("tiny", str(tiny_chatglm("int4")), device="cuda", **wishes)
        return open_chatglm(spec, lambda progress: None)

    return open_engine


ASKED = [Message("user", "hello")]
GREEDY = GenerationParams(max_length=4096, max_new_tokens=6, temperature=0)


def text_of(engine: ChatEngine, params: GenerationParams = GREEDY) -> str:
    return "".join(chunk.text for chunk in engine.stream_chat(ASKED, params, "1"))


def test_the_engine_answers_by_the_kernels_and_tells_of_them(engine_on: Callable[..., Any]) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    engine = engine_on()
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it would plan anew for each length of a prompt
    info = engine.info()
    assert (info.kernel, info.reason) == ("sm_86", "reasons.card_float16")
    assert (info.context_room, info.layers) == (512, ("cuda:0",) * 28)
    assert engine.speaker.decoder.model.piece == 8
    torch_alone = engine_on(found=NO_KERNELS)
    assert (torch_alone.info().kernel, torch_alone.info().reason) == ("", "reasons.card_kernels_old_card")
    assert text_of(engine) == text_of(torch_alone) != ""
    assert (engine.speaker.ahead, torch_alone.speaker.ahead) == (True, False)


def test_a_card_is_warm_before_anybody_asks(
    engine_on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tiny_chatglm: Callable[[str], Path]
) -> None:
    """A prompt of many rows and two tokens have gone through all that a first answer needs."""
    steps: list[int] = []
    inner = ChatGLMDecoder.step
    monkeypatch.setattr(
        ChatGLMDecoder, "step", lambda self, token: (steps.append(token), inner(self, token))[1]
    )
    warm = engine_on(found=NO_KERNELS)
    assert len(steps) == 2
    assert warm.speaker.decoder.cache.length > MOST_ROWS + 2
    assert warm.speaker.decoder.cache.capacity == 512  # it took no memory beyond what was planned
    monkeypatch.undo()
    cold = open_chatglm(EngineSpec("tiny", str(tiny_chatglm("int4")), device="cpu"), lambda progress: None)
    assert isinstance(cold, LoadedEngine)
    assert cold.speaker is not None
    assert cold.speaker.decoder.cache.length == 0  # type: ignore[attr-defined]


def test_a_cache_that_kernels_do_not_take_is_told(engine_on: Callable[..., Any]) -> None:
    engine = engine_on(kv_cache="bf16")
    assert (engine.info().kernel, engine.info().reason) == ("sm_86", "reasons.card_kernels_cache")
    assert text_of(engine)
    for taken in ("fp16", "fp32", "int8"):
        assert engine_on(kv_cache=taken).info().reason == "reasons.card_float16"
    without = engine_on(found=NO_KERNELS, kv_cache="bf16")
    assert without.info().reason == "reasons.card_kernels_old_card", "the graver one"


def test_a_reply_ends_where_the_room_does(engine_on: Callable[..., Any]) -> None:
    engine = engine_on(room=64, found=NO_KERNELS)
    *_, last = engine.stream_chat(ASKED, GenerationParams(max_length=4096, temperature=0, seed=1), "1")
    assert last.finish_reason == "length"
    assert last.usage.prompt_tokens + last.usage.completion_tokens == 64
    with pytest.raises(InvalidInput) as caught:
        list(engine.stream_chat([Message("user", "今" * 200)], GREEDY, "2"))
    assert caught.value.code == "prompt_beyond_memory"


@pytest.mark.parametrize("kept", ["auto", "int8"])
def test_its_cache_is_taken_once_and_stays_where_it_is(engine_on: Callable[..., Any], kept: str) -> None:
    engine = engine_on(room=96, found=NO_KERNELS, kv_cache=kept)
    cache = engine.speaker.decoder.cache
    places = [cache.room(layer).keys.data_ptr() for layer in range(4)]
    for round_ in range(6):
        said = [Message("user", "今" * 8 * round_)]
        list(engine.stream_chat(said, GenerationParams(max_new_tokens=2, temperature=0), str(round_)))
    assert engine.speaker.decoder.cache is cache
    assert cache.capacity == 96
    assert [cache.room(layer).keys.data_ptr() for layer in range(4)] == places


def test_torch_may_take_what_the_plan_may(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: dict[str, float] = {}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda name: SimpleNamespace(total_memory=8 * GIB)
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, name: set_to.update({name: part})
    )
    cards.limit_memory(planned(6 * GIB))
    assert set_to == {"cuda:0": pytest.approx((6 * GIB - 500_000_000 - CUDA_CONTEXT / 2) / (8 * GIB))}
    cards.limit_memory(planned(GIB, reserve=4 * GIB))
    assert set_to == {"cuda:0": 0.0}


def test_only_a_slow_start_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[Progress] = []

    def load(device: str, folder: Path) -> Loaded:
        if device == "cuda:1":
            for _ in range(100):
                if told:
                    break
                threading.Event().wait(0.1)
        return NO_KERNELS

    monkeypatch.setattr("glmui.engine.cards.cuda.load", load)
    quick = cards.open_cards(["cpu", "cuda:0", "cuda:0"], tmp_path, told.append)
    assert (list(quick.loaded), told) == ([torch.device("cuda:0")], [])
    cards.open_cards(["cuda:1"], tmp_path, told.append)
    assert told == [Progress("compiling")]


def ignore(part: float) -> None:
    """How far a prompt is."""
