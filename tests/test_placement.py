"""engine/placement.py: the plan, followed with what is free on a machine that is only imagined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glmui.engine import device as devices
from glmui.engine.chatglm_api import ChatGLM
from glmui.engine.placement import DeviceMap, Placement, device_map, placement
from glmui.errors import InvalidInput
from glmui.glm.checkpoint import load_model
from glmui.memory.model_size import CPU, ModelSize
from glmui.memory.plan import plan
from glmui.memory.plan_request import CUDA_CONTEXT, GIB, Machine, PlanRequest
from glmui.memory.published import SHAPES
from glmui.types import PIECE, EngineSpec

FULL = SHAPES["chatglm-6b"]
SPEC = EngineSpec("", "", quantize="int4")
LAST = "transformer.layers.27.mlp.dense_h_to_4h.weight"
TABLE = "transformer.word_embeddings.weight"


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let torch have cards with so many GiB free."""

    def have(*free: float, ram: float = 16) -> None:
        there = [f"cuda:{n}" for n in range(len(free))]
        monkeypatch.setattr(
            "glmui.engine.device.free_on_cards", lambda wish: tuple(int(n * GIB) for n in free)
        )
        monkeypatch.setattr("glmui.engine.device.available_devices", lambda: [*there, "cpu"])
        memory = SimpleNamespace(available=int(ram * GIB))
        monkeypatch.setattr("psutil.virtual_memory", lambda: memory)

    return have


def where(found: Placement, name: str) -> tuple[str, torch.dtype | None]:
    device, dtype = found.place(name)
    return str(device), dtype


@pytest.mark.parametrize(
    ("device", "free", "wanted", "last"),
    [
        ("auto", (6,), "cuda:0", "cuda:0"),
        ("auto", (4,), "mixed", "cpu"),
        ("auto", (4, 4), "mixed", "cuda:1"),
        ("auto", (1,), "cpu", "cpu"),
        ("auto", (), "cpu", "cpu"),
        ("mixed", (6,), "cuda:0", "cuda:0"),
        ("cuda", (1,), "cuda:0", "cuda:0"),
        ("cuda:1", (1, 24), "cuda:1", "cuda:1"),
        ("cpu", (24,), "cpu", "cpu"),
    ],
)
def test_the_plan_is_followed(
    device: str, free: tuple[float, ...], wanted: str, last: str, cards: Callable[..., None]
) -> None:
    cards(*free)
    found = placement(replace(SPEC, device=device), FULL)
    assert found.device == wanted
    assert found.plan
    assert found.layers == found.plan.layers
    assert where(found, "transformer.layers.0.mlp.dense_h_to_4h.weight")[0] == found.plan.head
    assert where(found, LAST) == (last, torch.float32 if last == "cpu" else torch.float16)
    assert where(found, "transformer.final_layernorm.weight")[0] == found.plan.head
    assert found.piece == found.plan.piece


def test_a_spec_says_how_many_layers_and_how_long(cards: Callable[..., None]) -> None:
    cards(24)
    some = placement(replace(SPEC, device="mixed", layers_on_gpu=5), FULL)
    assert some.layers == ("cuda:0",) * 5 + ("cpu",) * 23
    assert placement(replace(SPEC, prefill_piece=96), FULL).piece == 96
    assert placement(SPEC, FULL).room == 2048
    assert placement(replace(SPEC, context_most=300), FULL).room == 300
    assert placement(replace(SPEC, vram_cap=4 * GIB), FULL).device == "mixed"
    assert placement(replace(SPEC, vram_reserve=20 * GIB), FULL).device == "mixed"
    six = replace(SPEC, vram_cap=6 * GIB)
    long = SHAPES["chatglm3-6b-int4"]
    rooms = [placement(replace(six, kv_cache=kind), long).room for kind in ("fp16", "int8")]
    assert 2048 < rooms[0] <= rooms[1] <= long.context_length
    assert placement(six, FULL, torch.float32).plan != placement(six, FULL).plan, "wider numbers take more"


def test_a_quantised_head_leaves_the_embedding_in_ram(cards: Callable[..., None]) -> None:
    cards(6)
    found = placement(replace(SPEC, head_bits=8), FULL)
    assert found.device == "cuda:0"
    assert where(found, TABLE)[0] == CPU
    later = placement(replace(SPEC, head_bits=8), SHAPES["chatglm2-6b-int4"])
    assert where(later, "transformer.embedding.word_embeddings.weight")[0] == CPU
    assert where(later, "transformer.output_layer.weight")[0] == CPU  # quantised onto the card from there
    assert where(later, "transformer.encoder.final_layernorm.weight")[0] == "cuda:0"
    assert where(placement(SPEC, FULL), TABLE)[0] == "cuda:0"


def test_the_room_on_a_cpu_is_what_ram_is_free_for(cards: Callable[..., None]) -> None:
    spec = replace(SPEC, device="cpu", context=512)
    rooms = []
    for ram in (4.4, 4.6, 4.8, 16):
        cards(ram=ram)
        rooms.append(placement(spec, FULL).room)
    assert rooms == sorted(rooms)
    assert rooms[0] < rooms[-1] == 2048


def test_a_dtype_is_taken_everywhere_but_beside_a_card(cards: Callable[..., None]) -> None:
    cards()
    assert where(placement(SPEC, FULL, torch.bfloat16), LAST) == ("cpu", torch.bfloat16)
    cards(4)
    mixed = placement(SPEC, FULL, torch.bfloat16)
    assert where(mixed, "transformer.layers.0.x.weight") == ("cuda:0", torch.bfloat16)
    assert where(mixed, LAST) == ("cpu", torch.float32)


def test_no_plan_is_made_for_apples_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmui.engine.device.available_devices", lambda: ["mps", "cpu"])
    monkeypatch.setattr("glmui.engine.device.free_on_cards", lambda wish: ())
    found = placement(SPEC, FULL)
    assert (found.device, found.plan, found.room, found.piece) == ("mps", None, 0, PIECE)
    assert where(found, LAST) == ("mps", torch.float16)
    assert placement(replace(SPEC, device="cpu"), FULL).plan


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mixed", "mps"])
def test_a_missing_card_is_said(device: str, cards: Callable[..., None]) -> None:
    for free in ((), (6,)):
        cards(*free)
        if free and device in ("cuda", "mixed"):
            continue
        with pytest.raises(InvalidInput) as caught:
            placement(replace(SPEC, device=device), FULL)
        assert caught.value.code == ("no_card_for_layers" if device == "mixed" else "device_missing")


def test_layers_beside_a_card_compute_on_the_cpu(
    tiny_chatglm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a card: the "card" is the CPU in bfloat16, so that the seam between dtypes is real."""
    size = ModelSize.of(FULL, 4)
    spread = plan(size, Machine((4 * GIB,), 16 * GIB), PlanRequest())
    followed = replace(spread, layers=("cpu:0", "cpu:0", "cpu:0", "cpu"), head="cpu:0", embedding="cpu:0")
    monkeypatch.setattr("glmui.engine.placement.plan", lambda size, machine, request: followed)
    monkeypatch.setattr("glmui.engine.placement.room", lambda spec, size, found: 2048)
    found = placement(replace(SPEC, device="mixed"), FULL, torch.bfloat16)
    model = load_model(tiny_chatglm("int4"), found.place)
    blocks = model.get_submodule(model.BLOCKS).children()
    dtypes = [block.get_parameter("attention.dense.bias").dtype for block in blocks]
    assert dtypes == [torch.bfloat16] * 3 + [torch.float32]
    assert model.get_parameter("transformer.final_layernorm.weight").dtype == torch.bfloat16
    assert set(device_map(model).values()) == {"cpu"}
    assert len(device_map(model)) == 4 + 3
    with torch.inference_mode():
        logits = model(torch.tensor([[5, 20, 130001, 130004]]), last_only=True)
    assert logits.isfinite().all()


def test_a_device_map_prints_as_a_sentence_and_a_table(tiny_chatglm: Callable[[str], Path]) -> None:
    parts = {"embedding": ("cpu", 10**9), "t.layers.0": ("cuda:0", 10**8), "t.layers.1": ("cuda:0", 10**8)}
    found = DeviceMap({**parts, "t.layers.2": ("cpu", 10**8), "head": ("cpu", 10**6)})
    sentence, _, *rows = str(found).splitlines()
    assert "2" in sentence
    assert [row.split() for row in rows] == [
        ["embedding", "cpu", "1,000", "MB"],
        ["t.layers.0", "…", "t.layers.1", "cuda:0", "200", "MB"],
        ["t.layers.2", "…", "head", "cpu", "101", "MB"],
    ]
    assert found["head"] == "cpu"
    model = load_model(tiny_chatglm("int4"))
    blocks = sum(part.nbytes for part in model.get_submodule(model.BLOCKS).parameters())
    assert sum(size for name, (_, size) in device_map(model)._parts.items() if ".layers." in name) == blocks


def test_a_device_map_knows_weights_in_the_kernels_order(tiny_chatglm: Callable[[str], Path]) -> None:
    lm = ChatGLM.from_pretrained(tiny_chatglm("int4"), device="cpu")
    assert set(lm.device_map.values()) == {"cpu"}
    assert "MB" in str(lm.device_map)


def test_the_context_that_asking_opens_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The app reads what is free before there is one, and promises by that."""
    before, total = 5_950_000_000, 6 * GIB
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    free = (before - CUDA_CONTEXT // 2, total - 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (free[card], total))
    assert devices.free_on_cards("auto") == (before, total)
    size = ModelSize.of(SHAPES["chatglm-6b-int4"])
    here = Machine(devices.free_on_cards("auto")[:1], 16 * GIB)
    assert plan(size, here, PlanRequest()).layers_on_card == 28
