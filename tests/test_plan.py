"""engine/plan.py and the command: what goes where on machines nobody has here; and its bytes are true."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from glmui.cli import main
from glmui.engine.plan import CPU, CUDA_CONTEXT, GIB, PIECE, Machine, ModelSize, Wish, context_that_fits, plan
from glmui.engine.published import SHAPES
from glmui.errors import InvalidInput

INT4 = ModelSize.of(SHAPES["chatglm-6b-int4"])


def machine(*cards: float, ram: float = 16) -> Machine:
    return Machine(tuple(int(card * GIB) for card in cards), int(ram * GIB))


@pytest.mark.parametrize(
    ("vram", "context", "layers", "reason"),
    [
        ((), 2048, 0, "no_card"),
        ((2,), 2048, 0, "card_too_small"),
        ((4,), 2048, 16, "spread"),
        ((4,), 512, 20, "spread"),
        ((6,), 2048, 28, "one_card"),
        ((8,), 2048, 28, "one_card"),
        ((24,), 8192, 28, "one_card"),
        ((4, 4), 2048, 28, "several_cards"),
        ((2, 6), 2048, 28, "one_card"),
    ],
)
def test_as_many_layers_as_fit_go_on_the_cards(
    vram: tuple[float, ...], context: int, layers: int, reason: str
) -> None:
    found = plan(INT4, machine(*vram), Wish(context=context))
    assert (found.layers_on_card, found.reason, found.short) == (layers, reason, {})


@pytest.mark.parametrize("name", SHAPES)
def test_no_plan_takes_more_than_there_is_unless_it_says_so(name: str) -> None:
    size = ModelSize.of(SHAPES[name])
    for vram, ram, context in product((0, 2, 4, 6, 8, 24), (8, 16, 32), (512, 2048, 8192)):
        here, wish = machine(*[vram] * bool(vram), ram=ram), Wish(context=context)
        found = plan(size, here, wish)
        rooms = {f"cuda:{n}": card - CUDA_CONTEXT - wish.reserve for n, card in enumerate(here.cards)}
        rooms[CPU] = here.ram
        assert {device for device, need in found.on.items() if need > rooms[device]} == set(found.short)
        assert set(found.short) <= {CPU}  # a card is never planned fuller than it is
        assert (len(found.layers), found.table) == (size.layers, found.layers[0])
        more = plan(size, machine(vram + 2, ram=ram), wish)
        assert more.layers_on_card >= found.layers_on_card


def test_the_piece_is_the_models() -> None:
    from glmui.glm import parts

    assert PIECE == parts.PIECE


def test_what_is_asked_for_is_done_and_what_is_short_is_said() -> None:
    few = plan(INT4, machine(24), Wish(layers_on_card=5))
    assert (few.layers_on_card, few.reason) == (5, "spread")
    many = plan(INT4, machine(4), Wish(layers_on_card=28))
    assert many.layers_on_card == 28
    assert many.short["cuda:0"] > 1e9
    asked = plan(INT4, machine(4), Wish("cuda:0"))
    assert asked.layers_on_card == 28
    assert asked.short
    assert plan(INT4, machine(24), Wish("cpu")).reason == "cpu_asked"
    assert plan(INT4, machine(ram=4), Wish()).short[CPU] > 0
    with pytest.raises(InvalidInput, match="cuda:1"):
        plan(INT4, machine(6), Wish("cuda:1"))
    with pytest.raises(InvalidInput):
        plan(INT4, machine(), Wish("mixed"))


def test_the_context_that_fits_is_the_longest_that_does() -> None:
    here, wish = machine(6), Wish("cuda", context=8192)
    fits = context_that_fits(INT4, here, wish)
    assert not plan(INT4, here, Wish("cuda", context=fits)).short
    assert plan(INT4, here, Wish("cuda", context=fits + 1)).short
    assert context_that_fits(INT4, machine(2), Wish("cuda")) == 0
    assert context_that_fits(INT4, machine(24), wish) == 8192


@pytest.mark.parametrize("kind", ["fp16", "int8", "int4"])
def test_the_bytes_are_those_that_a_loaded_model_takes(
    tiny_chatglm: Callable[[str], Path], kind: str
) -> None:
    import torch

    from glmui.glm.checkpoint import everything_on, load_model
    from glmui.glm.config import read_config

    folder = tiny_chatglm(kind)
    model = load_model(folder, everything_on("cpu", torch.float32))
    size = ModelSize.of(read_config(folder))
    blocks = sum(p.nbytes for p in model.transformer.layers.parameters())
    assert blocks == size.layers * size.layer_bytes(CPU, 0)
    table = model.transformer.word_embeddings.weight.nbytes
    assert table <= size.table_bytes() <= table + 8 * size.width
    cache = model.new_cache(300)
    model(torch.tensor([[5, 6, 130001, 130004]]), cache=cache)
    cached = sum(part.nbytes for layer in range(size.layers) for part in cache.read(layer, 300))
    assert cached == size.layers * (size.layer_bytes(CPU, 300) - size.layer_bytes(CPU, 0))


def test_the_command_plans_for_any_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = ["plan", "--data-dir", str(tmp_path), "--ram", "16"]
    assert main([*base, "--model", "chatglm-6b-int4", "--vram", "6", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layers_on_gpu"] == len(told["layers"]) == 28
    assert 4.5 < told["predicted_vram_gb"] < 5.3
    assert told["reason"] == "one_card"
    assert {"layer", "device", "mb"} <= told["layers"][0].keys()
    assert main([*base, "--model", "chatglm-6b-int4", "--vram", "4", "--vram", "4"]) == 0
    assert "layers 16 to 27" in capsys.readouterr().out
    assert main([*base, "--model", "chatglm-6b", "--vram", "0"]) == 1
    assert "missing" in capsys.readouterr().out
    assert main([*base, "--model", "chatglm-6b", "--vram", "0", "--quantize", "int4"]) == 0
    capsys.readouterr()
    assert main([*base, "--model", "nobody"]) == 2
    assert "chatglm3-6b-int4" in capsys.readouterr().err
    assert main([*base, "--model", "chatglm-6b", "--vram", "nan"]) == 2


def test_the_command_reads_a_folder(
    tiny_chatglm: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(tiny_chatglm("int8"))
    assert main(["plan", "--data-dir", str(tmp_path), "--model", folder, "--vram", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted_vram_gb"] < 0.2
