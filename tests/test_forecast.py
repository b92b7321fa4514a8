"""memory/forecast.py: what becomes of a model with the memory that a meter reads, and how it is told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from glmui import i18n
from glmui.errors import InvalidInput, ModelError
from glmui.memory import forecast as module
from glmui.memory.forecast import explain, forecast, machine_of
from glmui.memory.model_size import CPU, ModelSize
from glmui.memory.plan import plan
from glmui.memory.plan_request import GIB, Machine, PlanRequest
from glmui.memory.published import SHAPES
from glmui.meter import Card, Reading
from glmui.types import EngineInfo, EngineSpec

SIX = Card(0, "A card", GIB // 4 * 3, 6 * GIB, None)
FREE = Reading((SIX,), 4 * GIB, 16 * GIB, None, "")
SIZE = ModelSize.of(SHAPES["chatglm-6b-int4"])
ON_CARD = EngineInfo(device="cuda:0")


@pytest.fixture
def spec(tmp_path: Path) -> EngineSpec:
    """ChatGLM-6B-INT4 as far as its config.json tells."""
    config = {
        "model_type": "chatglm", "hidden_size": 4096, "inner_hidden_size": 16384, "num_layers": 28,
        "num_attention_heads": 32, "vocab_size": 130528, "max_sequence_length": 2048, "quantization_bit": 4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return EngineSpec("chatglm-6b-int4", str(tmp_path))


def test_it_is_the_plan_for_what_is_free(spec: EngineSpec) -> None:
    found = forecast(spec, FREE)
    assert found
    assert found.machine == Machine((6 * GIB - GIB // 4 * 3,), 12 * GIB)
    assert found.size == SIZE
    assert found.plan.layers_on_card == 26
    assert found.room == 2048
    capped = forecast(replace(spec, vram_cap=4 * GIB), FREE)
    assert capped
    assert capped.plan.layers_on_card == 16
    with pytest.raises(InvalidInput):
        forecast(replace(spec, device="cuda:1"), FREE)


def test_a_slider_is_followed_at_once(spec: EngineSpec) -> None:
    begin = time.perf_counter()
    for layers in range(29):
        found = forecast(replace(spec, device="mixed", layers_on_gpu=layers), FREE)
        assert found
        assert found.plan.layers_on_card == layers
    assert (time.perf_counter() - begin) / 29 < 0.05, "5 ms on a quiet machine"


def test_what_our_own_engine_holds_is_free(spec: EngineSpec) -> None:
    ours = replace(SIX, used=5 * GIB, own=4 * GIB)
    held = Reading((ours,), 10 * GIB, 16 * GIB, 5 * GIB, "", 2 * GIB)
    assert machine_of(held, ON_CARD, {}) == Machine((5 * GIB,), 8 * GIB)
    assert machine_of(held, None, {}) == Machine((GIB,), 6 * GIB)
    untold = Reading((replace(ours, own=None),), 10 * GIB, 16 * GIB, None, "")
    windows = machine_of(untold, ON_CARD, {})
    assert windows
    assert 4.5 * GIB < windows.cards[0] < 6 * GIB, "all but what a desktop takes"
    elsewhere = machine_of(untold, EngineInfo(device="cpu", layers=("cpu",)), {})
    assert elsewhere == Machine((GIB,), 6 * GIB), "what others hold of a card is not ours"
    told = machine_of(held, EngineInfo(device="auto", state="loading"), {})
    assert told == Machine((5 * GIB,), 8 * GIB), "where the driver tells, nobody need say"
    assert forecast(spec, held, ON_CARD) != forecast(spec, held)


def test_what_cannot_be_read_is_not_counted_on() -> None:
    unknown = Reading((replace(SIX, used=None),), 4 * GIB, 16 * GIB, None, "unknown")
    assert machine_of(unknown, None, {}) == Machine((0,), 12 * GIB)
    assert machine_of(replace(unknown, ram_used=None), None, {}) is None


@pytest.mark.parametrize(
    ("visible", "free"),
    [(None, (1, 2)), ("", ()), ("-1", ()), ("1", (2,)), ("1,0", (2, 1)), ("7", ()), ("GPU-77aa", (1, 2))],
)
def test_only_visible_cards_count(visible: str | None, free: tuple[int, ...]) -> None:
    two = tuple(Card(n, "", 0, (n + 1) * GIB, None) for n in range(2))
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    machine = machine_of(Reading(two, 0, GIB, None, ""), None, environ)
    assert machine
    assert machine.cards == tuple(n * GIB for n in free)


def test_nothing_is_foretold_of_what_no_plan_knows(
    spec: EngineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = replace(FREE, cards=())
    assert forecast(EngineSpec("echo", "echo"), FREE) is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert forecast(EngineSpec("other", str(tmp_path / "other")), FREE) is None
    assert forecast(replace(spec, device="mps"), bare) is None
    assert forecast(spec, bare)
    monkeypatch.setattr(module, "_ROCM", tmp_path)  # which is there
    assert forecast(spec, bare) is None
    assert forecast(spec, FREE), "a card of NVIDIA's is known"
    assert forecast(replace(spec, device="cpu"), bare)
    with pytest.raises(ModelError):
        forecast(EngineSpec("gone", str(tmp_path / "gone")), FREE)


@pytest.mark.parametrize("language", i18n.LANGUAGES)
def test_a_table_adds_up(language: str) -> None:
    for cards, wish in product(
        ((), (2,), (4,), (6,), (4, 4)), (PlanRequest(), PlanRequest(head_bits=8, kv_cache="int8"))
    ):
        found = plan(SIZE, Machine(tuple(card * GIB for card in cards), 16 * GIB), wish)
        told = explain(found, SIZE, language)
        totals = dict.fromkeys(found.on, 0)
        for row in told.rows:
            totals[row.device] += row.size
        assert totals == found.on
        assert not any("{" in words for words in (told.sentence, *told.notes, *(r.part for r in told.rows)))
        assert all(f"{need / 1e9:.2f}" in " ".join(told.notes) for need in found.on.values())


@pytest.mark.parametrize(
    ("cards", "ram", "wish", "advice"),
    [
        ((6,), 16, PlanRequest(), ""),
        ((5.3,), 16, PlanRequest(), "head_bits = 8"),
        ((5,), 16, PlanRequest(kv_cache="fp16"), "head_bits = 8, kv_cache = int8"),
        ((5.3,), 16, PlanRequest("cuda"), "--context"),
        ((2,), 16, PlanRequest("cuda"), "Close other programs"),
        ((), 4, PlanRequest(kv_cache="fp16"), "from the disk"),
    ],
)
def test_advice(cards: tuple[float, ...], ram: float, wish: PlanRequest, advice: str) -> None:
    found = plan(SIZE, Machine(tuple(int(card * GIB) for card in cards), int(ram * GIB)), wish)
    told = explain(found, SIZE, "en")
    assert advice in told.advice
    assert bool(told.advice) == bool(advice)
    assert told.advice == (told.notes[-1] if advice else "")


def test_a_single_layer_is_called_one() -> None:
    found = plan(SIZE, Machine((24 * GIB,), 16 * GIB), PlanRequest(layers_on_gpu=27))
    parts = [row.part for row in explain(found, SIZE, "en").rows]
    assert "layers 0 to 26" in parts
    assert "layer 27" in parts


def test_the_app_process_may_ask(tiny_chatglm: Callable[[str], Path]) -> None:
    found = forecast(EngineSpec("tiny", str(tiny_chatglm("int4")), device=CPU), FREE)
    assert found
    assert found.plan.short == {}
