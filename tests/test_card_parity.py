"""On a real card: the published numbers, the same ones by every way, flat memory, and life after running out.

All of it is skipped where there is no card. It needs no more than torch, pytest, psutil, safetensors and
sentencepiece, and nothing but what lies here:

    python -m pytest --noconftest tests/test_card_parity.py
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glmui.engine import cards
from glmui.engine.card_step import CardStep, can_step
from glmui.engine.decoders import GLMDecoder, Held, decoder_of
from glmui.glm.checkpoint import AnyModel, everything_on, load_model
from glmui.glm.config import GLMConfig
from glmui.memory.model_size import ModelSize
from glmui.memory.plan import plan
from glmui.memory.plan_request import Machine, PlanRequest
from glmui.quant import QuantizedLinear
from glmui.quant.kernels import cuda
from glmui.quant.on_card import CardLinear, use_card_kernels
from tests import chatglm2_fixture, chatglm_fixture
from tests.chatglm2_fixture import tiny_chatglm2  # noqa: F401  (a fixture, where there is no conftest.py)
from tests.chatglm_fixture import tiny_chatglm  # noqa: F401

# How far any logit of a prompt in float16 may be from float32: for ChatGLM-6B the goal itself, plain half
# arithmetic on a CPU comes to 5.2e-2 in the worst of these 39 prompts (2.5e-2 in the usual one). The logits
# of the other two are spread wider (3.5 against 2.8), ChatGLM2 rounds its rotary angles too, as published,
# which alone is 0.1 beyond a hundred tokens: half arithmetic comes to 0.128 and 5.2e-2.
TOLERANCE = {"chatglm": 6e-2, "chatglm2": 0.2, "chatglm3": 8e-2}
# As much more in the worst of some hundred steps, each of which reads keys that all before it have rounded:
# half arithmetic comes to 1.2, 0.9 and 1.6 times the above.
ALONG = 2.5
CLOSE_CALL = 1e-3  # a step whose two best logits are nearer may go the other way
MIB = 2**20
GAP = [130001, 130004]  # [gMASK] and <sop> of ChatGLM-6B
EACH = [("chatglm", kind) for kind in chatglm_fixture.KINDS] + [
    (family, kind) for family in chatglm2_fixture.FAMILIES for kind in chatglm2_fixture.KINDS
]
each_model = pytest.mark.parametrize(("family", "kind"), EACH)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")

Folder = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def _no_gradients_and_the_same_numbers_each_time() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda:0")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> cuda.Loaded:
    """The kernels, compiled for this card: where that fails, the tests that need them do."""
    return cuda.load("cuda:0", tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Folder:
    """A tiny model's folder by family and kind."""
    first: Callable[[str], Path] = request.getfixturevalue("tiny_chatglm")
    others: Folder = request.getfixturevalue("tiny_chatglm2")
    return lambda family, kind: first(kind) if family == "chatglm" else others(family, kind)


@cache
def cases(family: str, kind: str) -> list[dict[str, Any]]:
    """The published code's answers."""
    goldens = chatglm_fixture.goldens() if family == "chatglm" else chatglm2_fixture.goldens()[family]
    found: list[dict[str, Any]] = goldens["models"][kind]["prompts"]
    return found


def on_card(folder: Path, family: str, device: torch.device, dtype: torch.dtype) -> AnyModel:
    return load_model(folder, everything_on(device, dtype), family=family)


def ignore(part: float) -> None:
    """How far a prompt is."""


def steps(decoder: GLMDecoder, case: dict[str, Any], most: int = 12) -> Iterator[tuple[Tensor, int, float]]:
    """Logits on the CPU, the published id, and the gap to the second best: for each step of a reply."""
    logits = decoder.prefill(case["input_ids"], ignore)
    gaps = case.get("greedy_gaps", [1.0] * len(case["greedy_ids"]))
    for token, gap in list(zip(case["greedy_ids"], gaps, strict=True))[:most]:
        yield logits.float().cpu(), token, gap
        logits = decoder.step(token)


def test_the_kernels_are_here(loaded: cuda.Loaded) -> None:
    """From compute capability 7.5 on they are to be compiled, checked and used on every card."""
    if torch.version.hip or torch.cuda.get_device_capability(0) < (7, 5):
        pytest.skip("this card has no kernels")
    assert loaded.kernels is not None, loaded.reason
    assert loaded.block is not None, loaded.reason
    assert loaded.name == "sm_{}{}".format(*torch.cuda.get_device_capability(0))


@each_model
def test_published_ids_in_float32(folder: Folder, device: torch.device, family: str, kind: str) -> None:
    model = on_card(folder(family, kind), family, device, torch.float32)
    for case in cases(family, kind):
        for logits, golden, gap in steps(decoder_of(model), case, 32):
            assert int(logits.argmax()) == golden or gap < CLOSE_CALL, case["name"]


@each_model
@pytest.mark.parametrize("way", ["torch", "kernels", "kernels and graph"])
def test_logits_in_float16(
    folder: Folder, device: torch.device, loaded: cuda.Loaded, family: str, kind: str, way: str
) -> None:
    exact = load_model(folder(family, kind), family=family)
    model = on_card(folder(family, kind), family, device, torch.float16)
    step = None
    if way != "torch":
        if loaded.kernels is None or loaded.block is None:
            pytest.skip(f"no kernels: {loaded.reason}")
        use_card_kernels(model, {device: loaded.kernels})
        layers = sum(isinstance(module, CardLinear) for module in model.modules())
        assert layers == (0 if kind == "fp16" else 4 * model.config.num_layers)
        if "graph" in way:
            assert can_step(model, loaded.block)
            step = CardStep(model, loaded.block)
    of_prompts = []
    for case in cases(family, kind):
        both = zip(steps(decoder_of(exact), case), steps(decoder_of(model, step=step), case), strict=True)
        errors = [float((got - wanted).abs().max()) for (wanted, _, _), (got, _, _) in both]
        of_prompts.append(errors[0])
        assert max(errors) < ALONG * TOLERANCE[family], case["name"]
    assert max(of_prompts) < TOLERANCE[family]
    assert step is None or step.reason == ""


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "rows"), [(4096, 12288), (4096, 4096), (4096, 16384), (16384, 4096)])
def test_layers_of_full_size(
    device: torch.device, loaded: cuda.Loaded, bits: int, columns: int, rows: int
) -> None:
    if loaded.kernels is None:
        pytest.skip(f"no kernels: {loaded.reason}")
    linear = nn.Linear(columns, rows, dtype=torch.float16, device=device)
    plain = QuantizedLinear.of(linear, bits)
    model = nn.Sequential(plain)
    use_card_kernels(model, {device: loaded.kernels})
    wide = QuantizedLinear(columns, rows, bits, plain.weight, plain.weight_scale.float(), plain.bias.float())  # type: ignore[union-attr]
    for count in (1, 2, 3, 8, 9, 300):
        x = torch.randn(count, columns, device=device).half()
        wanted = wide(x.float())
        assert (model(x).float() - wanted).norm() / wanted.norm() < 2e-3, count


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
@pytest.mark.parametrize("kept", [None, torch.int8])
def test_a_graph_gives_what_its_launches_give(
    folder: Folder, device: torch.device, loaded: cuda.Loaded, family: str, kept: torch.dtype | None
) -> None:
    if loaded.kernels is None or loaded.block is None:
        pytest.skip(f"no kernels: {loaded.reason}")
    model = on_card(folder(family, "int4"), family, device, torch.float16)
    model.cache_dtype = kept
    use_card_kernels(model, {device: loaded.kernels})
    recorded, eager = CardStep(model, loaded.block), CardStep(model, loaded.block, record=None)
    for case in cases(family, "int4")[:3]:
        both = zip(
            steps(decoder_of(model, Held(64), recorded), case),
            steps(decoder_of(model, Held(64), eager), case),
            strict=True,
        )
        for (one, _, _), (other, _, _) in both:
            assert torch.equal(one, other)
    assert recorded.reason == ""


@pytest.mark.parametrize("kept", [None, torch.int8])
def test_memory_is_flat_over_forty_rounds(
    folder: Folder, device: torch.device, loaded: cuda.Loaded, kept: torch.dtype | None
) -> None:
    model = on_card(folder("chatglm", "int4"), "chatglm", device, torch.float16)
    model.cache_dtype = kept
    found = cards.Cards({device: loaded})
    cards.settle(model, found)
    decoder = decoder_of(model, Held(512, 512), cards.step_of(model, found))
    taken = []
    for round_ in range(40):
        logits = decoder.prefill([*range(300, 300 + min(500, 13 * (round_ + 1))), *GAP], ignore)
        for _ in range(8):
            logits = decoder.step(int(logits.argmax()))
        taken.append((torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)))
    allocated, reserved = zip(*taken[3:], strict=True)
    assert max(allocated) - allocated[0] <= 16 * MIB
    assert max(reserved) - reserved[0] <= 64 * MIB  # longer prompts take longer pieces on the way


def test_running_out_of_memory_is_survived_twenty_times(
    folder: Folder, device: torch.device, loaded: cuda.Loaded
) -> None:
    """As the plan's bound makes it happen: torch refuses, nothing is lost, the next prompt is answered."""
    model = on_card(folder("chatglm", "int4"), "chatglm", device, torch.float16)
    found = cards.Cards({device: loaded})
    cards.settle(model, found)
    decoder = decoder_of(model, Held(256, 256), cards.step_of(model, found))
    small = [*range(300, 320), *GAP]
    before = decoder.prefill(small, ignore).clone()
    after = decoder.step(20).clone()
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        for _ in range(20):
            torch.cuda.empty_cache()
            most = torch.cuda.memory_reserved(device) + 8 * MIB
            torch.cuda.set_per_process_memory_fraction(most / total, device)
            with pytest.raises(torch.OutOfMemoryError):
                decoder.prefill([*range(300, 300 + 60_000), *GAP], ignore)
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            assert (decoder.prefill(small, ignore) - before).abs().max() < 1e-2
            assert (decoder.step(20) - after).abs().max() < 1e-2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_the_plans_bound_is_kept(device: torch.device) -> None:
    size = ModelSize.of(GLMConfig(130528, 32, 128, 4, 2, quantization_bit=4))
    try:
        cards.limit_memory(plan(size, Machine((2_000_000_000,), 2**34), PlanRequest("cuda")))
        torch.empty(500_000_000, dtype=torch.uint8, device=device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1_500_000_000, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
