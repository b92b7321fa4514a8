"""The way down when memory runs out: which rung comes next, that every way ends, and what is told of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from glmui import i18n, notes
from glmui.errors import EngineError, from_values, to_values
from glmui.memory.ladder import Kind, Ladder, Phase, Trouble, at_foot, lower
from glmui.types import EngineInfo, EngineSpec

CARD = EngineSpec("m", "folder", device="cuda:0")
HOST = EngineSpec("m", "folder", device="cpu")
AUTO = EngineSpec("m", "folder")
MIXED = EngineSpec("m", "folder", device="mixed", layers_on_gpu=8)
LAYERS = 28


def info_of(spec: EngineSpec, family: str = "chatglm", room: int = 0) -> EngineInfo:
    """What an engine that holds this spec would tell of itself, where "auto" found a card for everything."""
    on_card = {"cpu": 0, "mixed": spec.layers_on_gpu}.get(spec.device, LAYERS)
    on_card = LAYERS if on_card is None else on_card
    layers = ("cuda:0",) * on_card + ("cpu",) * (LAYERS - on_card)
    return EngineInfo(family=family, layers=layers if family == "chatglm" else (), context_room=room)


LOADING = EngineInfo(family="chatglm")  # all that is known before a model is loaded


@pytest.mark.parametrize(
    ("spec", "info", "stage", "device", "kind", "changed"),
    [
        # a long prompt on a card: smaller pieces first, then layers, then the CPU
        (CARD, info_of(CARD), "prefill", "cuda:0", "pieces", {"prefill_piece": 64}),
        (
            CARD,
            replace(info_of(CARD), prefill_piece=1024),
            "prefill",
            "cuda:0",
            "pieces",
            {"prefill_piece": 256},
        ),
        (
            replace(CARD, prefill_piece=512),
            info_of(CARD),
            "prefill",
            "cuda:0",
            "pieces",
            {"prefill_piece": 128},
        ),
        (
            replace(CARD, prefill_piece=128),
            info_of(CARD),
            "prefill",
            "cuda:0",
            "pieces",
            {"prefill_piece": 64},
        ),
        (
            replace(CARD, prefill_piece=64),
            info_of(CARD),
            "prefill",
            "cuda:0",
            "layers",
            {"device": "mixed", "layers_on_gpu": 21},
        ),
        # a growing reply: half the context, from what there was room for
        (CARD, info_of(CARD), "decode", "cuda:0", "context", {"context_most": 1024}),
        (CARD, info_of(CARD, room=1500), "decode", "cuda:0", "context", {"context_most": 750}),
        (
            replace(CARD, context_most=700),
            info_of(CARD, room=700),
            "decode",
            "cuda:0",
            "context",
            {"context_most": 512},
        ),
        (replace(CARD, context_most=512), info_of(CARD), "decode", "cuda:0", "layers", {"layers_on_gpu": 21}),
        # what is saved on a card is not given to more layers by the plan
        (
            AUTO,
            info_of(MIXED),
            "decode",
            "cuda:0",
            "context",
            {"context_most": 1024, "device": "mixed", "layers_on_gpu": 8},
        ),
        (AUTO, info_of(MIXED), "prefill", "cuda:0", "pieces", {"prefill_piece": 64, "layers_on_gpu": 8}),
        (AUTO, info_of(CARD), "prefill", "cuda:0", "pieces", {"device": "auto", "layers_on_gpu": None}),
        # layers: a quarter, two at least, and then none
        (MIXED, info_of(MIXED), "loading", "cuda:0", "layers", {"layers_on_gpu": 6}),
        (replace(MIXED, layers_on_gpu=3), LOADING, "loading", "cuda:0", "layers", {"layers_on_gpu": 1}),
        (
            replace(MIXED, layers_on_gpu=2),
            LOADING,
            "loading",
            "cuda:0",
            "cpu",
            {"device": "cpu", "layers_on_gpu": None},
        ),
        # nobody knows yet how many layers the plan chose: it is told to leave more free
        (AUTO, LOADING, "loading", "cuda:0", "reserve", {"device": "auto", "vram_reserve": 1_000_000_000}),
        (CARD, LOADING, "loading", "cuda:0", "reserve", {"device": "mixed", "vram_reserve": 1_000_000_000}),
        (replace(AUTO, vram_reserve=3_000_000_000), LOADING, "loading", "cuda:0", "cpu", {"device": "cpu"}),
        # several cards: which of them became emptier is the plan's affair
        (
            AUTO,
            EngineInfo(family="chatglm", layers=("cuda:0", "cuda:1")),
            "loading",
            "cuda:1",
            "reserve",
            {"vram_reserve": 1_000_000_000},
        ),
        # an Apple card holds a model whole
        (AUTO, LOADING, "loading", "mps", "cpu", {"device": "cpu"}),
        # on the CPU what was cut down for the card is whole again
        (
            replace(MIXED, layers_on_gpu=1, context_most=512, prefill_piece=64),
            info_of(replace(MIXED, layers_on_gpu=1)),
            "decode",
            "cuda:0",
            "cpu",
            {"device": "cpu", "context_most": 0, "prefill_piece": 0},
        ),
        # the RAM: nothing is moved off a card
        (HOST, info_of(HOST), "prefill", "cpu", "pieces", {"prefill_piece": 64}),
        (replace(HOST, prefill_piece=64), info_of(HOST), "prefill", "cpu", "context", {"context_most": 1024}),
        (MIXED, info_of(MIXED), "decode", "cpu", "context", {"device": "mixed", "layers_on_gpu": 8}),
        # a transformers model goes wherever it goes as a whole
        (CARD, info_of(CARD, "causal_lm"), "prefill", "cuda:0", "cpu", {"device": "cpu"}),
    ],
)
def test_the_next_rung(
    spec: EngineSpec, info: EngineInfo, stage: Phase, device: str, kind: Kind, changed: dict[str, object]
) -> None:
    rung = lower(spec, info, Trouble(stage, device))
    assert rung is not None
    assert (rung.kind, {name: getattr(rung.spec, name) for name in changed}) == (kind, changed)


@pytest.mark.parametrize(
    ("spec", "info", "stage", "device"),
    [
        (HOST, LOADING, "loading", "cpu"),
        (CARD, LOADING, "loading", "cpu"),
        (replace(HOST, context_most=512), info_of(HOST), "decode", "cpu"),
        (replace(HOST, context_most=512, prefill_piece=64), info_of(HOST), "prefill", "cpu"),
        (replace(HOST, context=400), info_of(HOST), "decode", "cpu"),
        (HOST, info_of(HOST, "causal_lm"), "decode", "cpu"),
    ],
)
def test_the_foot_of_the_ladder(spec: EngineSpec, info: EngineInfo, stage: Phase, device: str) -> None:
    assert lower(spec, info, Trouble(stage, device)) is None


@pytest.mark.parametrize("family", ["chatglm", "causal_lm"])
@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("spec", [CARD, HOST, AUTO, MIXED, replace(CARD, context=32768, prefill_piece=512)])
def test_every_way_down_ends_and_only_lowers(spec: EngineSpec, loaded: bool, family: str) -> None:
    for stages in product(("loading", "prefill", "decode"), repeat=2):
        now, seen = spec, [spec]
        for step in range(40):
            trouble = Trouble(stages[step % 2], "cpu" if now.device == "cpu" else "cuda:0")  # type: ignore[arg-type]
            rung = lower(now, info_of(now, family) if loaded else EngineInfo(family=family), trouble)
            if rung is None:
                break
            now = rung.spec
            seen.append(now)
        else:
            pytest.fail("no end")
        assert len(set(seen)) == len(seen)
        assert now.device == "cpu"


def test_an_error_as_trouble() -> None:
    assert Trouble.of(EngineError("out_of_memory", stage="prefill", device="cuda:1")) == Trouble(
        "prefill", "cuda:1"
    )
    assert Trouble.of(EngineError("out_of_memory")) == Trouble("decode", "cpu")
    assert Trouble.of(EngineError("engine_died", detail="SIGKILL")) is None


# Where a model stands


def test_a_model_stays_lowered_until_another_spec_is_chosen() -> None:
    ladder = Ladder(CARD)
    assert (ladder.spec, ladder.reason, ladder.news()) == (CARD, "", "")
    ladder.lower(info_of(CARD), Trouble("prefill", "cuda:0"))
    assert ladder.spec == replace(CARD, prefill_piece=64)
    assert ladder.reason == "reasons.memory_pieces"
    ladder.choose(CARD)
    assert ladder.spec == replace(CARD, prefill_piece=64)
    ladder.choose(replace(CARD, adapter="a"))  # changed without loading anew
    assert ladder.spec == replace(CARD, prefill_piece=64, adapter="a")
    ladder.choose(HOST)
    assert (ladder.spec, ladder.reason) == (HOST, "")


def test_each_change_is_told_once_with_its_last_value() -> None:
    ladder = Ladder(replace(CARD, prefill_piece=1024))
    for _ in range(2):
        ladder.lower(info_of(CARD), Trouble("prefill", "cuda:0"))
    ladder.lower(info_of(CARD), Trouble("decode", "cuda:0"))
    assert ladder.news().splitlines() == [
        notes.note("memory_pieces", tokens=64),
        notes.note("memory_context", tokens=1024),
    ]
    assert ladder.news() == ""


def test_on_the_cpu_what_was_tried_on_the_card_is_not_told() -> None:
    ladder = Ladder(replace(CARD, prefill_piece=64))
    while ladder.spec and ladder.spec.device != "cpu":
        assert ladder.lower(info_of(ladder.spec), Trouble("prefill", "cuda:0"))
    assert ladder.news() == "memory_cpu"
    ladder.reset()
    assert ladder.spec == replace(CARD, prefill_piece=64)


def test_nothing_chosen_nothing_lowered() -> None:
    assert Ladder(None).lower(LOADING, Trouble("loading", "cuda:0")) is None


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", ["pieces", "context", "layers", "reserve", "cpu"])
def test_every_rung_has_its_words(kind: str, language: str) -> None:
    words = i18n.table(language)
    values = {"tokens": 123, "layers": 123, "gb": "123"}
    (said,) = notes.words(notes.note(f"memory_{kind}", **values), language)
    kept = EngineError(f"memory_kept.{kind}", **values).message(language)
    assert said != f"notes.memory_{kind}"
    assert ("123" in said) == ("123" in kept) == (kind != "cpu")
    assert words["chat.continue"] in kept
    assert f"reasons.memory_{kind}" in words


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("stage", ["loading", "prefill", "decode"])
def test_at_the_foot_it_is_said_whose_memory_it_was_and_what_helps_there(stage: Phase, language: str) -> None:
    ram, card = (from_values(*to_values(at_foot(Trouble(stage, device)))) for device in ("cpu", "cuda:1"))
    assert Trouble.of(card) == Trouble(stage, "cuda:1")
    said, on_card = ram.message(language), card.message(language)
    assert "out_of_memory" not in said + on_card
    assert "cuda:1" in on_card
    assert ("RAM" if language == "en" else "内存不足") in said
    assert "max_length" not in said + on_card
    assert ("settings" in on_card) or ("设置" in on_card), "others were chosen, else there would be a rung"
    assert ("head_bits" in said) == (stage == "loading"), "what would not help is not advised"
    assert ("kv_cache" in said) == (stage != "loading")
