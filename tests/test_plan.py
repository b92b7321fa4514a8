"""memory/plan.py and the command: what goes where on machines nobody has here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from glmui.cli import main
from glmui.errors import InvalidInput
from glmui.memory.fitting import (
    context_of,
    context_that_fits,
    lighter,
    longest_context,
    most_tokens,
    request_of,
    room,
    slow_context,
)
from glmui.memory.model_size import CPU, Forms, ModelSize
from glmui.memory.plan import Plan, bytes_on, plan
from glmui.memory.plan_request import GIB, PIECES, Machine, PlanRequest, budget
from glmui.memory.published import SHAPES
from glmui.types import LEAST_CONTEXT, PIECE, EngineSpec

INT4 = ModelSize.of(SHAPES["chatglm-6b-int4"])
HALF = PlanRequest(kv_cache="fp16")  # as the app keeps keys and values, unless it is asked for exactness
SPEC = EngineSpec("chatglm-6b-int4", "")
PARTS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
VRAM, RAM, CONTEXTS = (0, 2, 4, 6, 8, 24), (8, 16, 32), (512, 1024, 2048, 4096, 8192)


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
    found = plan(INT4, machine(*vram), replace(HALF, context=context))
    assert (found.layers_on_card, found.reason, found.short) == (layers, reason, {})


def test_six_gigabytes_are_enough() -> None:
    """What docs/plan.md promises of ChatGLM-6B-INT4 with 2,048 tokens, all layers on the card."""
    usual = plan(INT4, machine(6), HALF)
    small = plan(INT4, machine(6), PlanRequest(head_bits=8, kv_cache="int8"))
    assert usual.layers_on_card == small.layers_on_card == 28
    assert 4.8e9 < usual.vram < 5.3e9
    assert 3.8e9 < small.vram < 4.6e9
    assert (usual.embedding, small.embedding, small.head) == ("cuda:0", CPU, "cuda:0")
    kept = 28 * (INT4.layer_bytes("cuda:0") + INT4.cache_bytes("cuda:0", 512, "fp16"))
    for_512 = plan(INT4, machine(6), replace(HALF, context=512))
    assert for_512.vram - kept - INT4.head_bytes("cuda:0", 16) < 0.35e9


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("asked", [HALF, PlanRequest(head_bits=8, kv_cache="int8")], ids=["usual", "small"])
def test_over_all_machines(name: str, asked: PlanRequest) -> None:
    size = ModelSize.of(SHAPES[name])
    for ram, context in product(RAM, CONTEXTS):
        longer = replace(asked, context=context)
        plans = [plan(size, machine(*[vram] * bool(vram), ram=ram), longer) for vram in VRAM]
        for found in plans:
            check(size, found)
        on_card = [found.layers_on_card for found in plans]
        assert on_card == sorted(on_card), "more VRAM never means fewer layers on the card"
    for vram, ram in product(VRAM, RAM):
        here = machine(*[vram] * bool(vram), ram=ram)
        plans = [plan(size, here, replace(asked, context=context)) for context in CONTEXTS]
        on_card = [found.layers_on_card for found in plans]
        assert on_card == sorted(on_card, reverse=True), "a longer context never means more layers there"
    for device in (CPU, "cuda"):
        fixed = replace(asked, device=device, prefill_piece=256)
        needs = [plan(size, machine(24), replace(fixed, context=context)).on for context in CONTEXTS]
        assert needs == sorted(needs, key=lambda on: sum(on.values()))


def check(size: ModelSize, found: Plan) -> None:
    """Nothing takes more than there is unless that is said; and a card is never planned fuller than it is."""
    here, asked = found.machine, found.request
    over = {device for device, need in found.on.items() if need > budget(here, asked, device)}
    assert over == set(found.short) <= {CPU}
    assert len(found.layers) == size.layers
    assert list(found.layers) == sorted(found.layers, reverse=True), "cards first: cuda:0, then cpu"
    assert found.head == found.layers[0]
    assert found.piece in PIECES
    assert found.piece <= PIECE or CPU not in found.layers
    held = context_of(size, found, found.request.context)
    assert (held == found.request.context) == (not found.short)


def test_a_long_piece_costs_no_layer() -> None:
    for tenths in range(30, 80):
        here = machine(tenths / 10)
        free, small = plan(INT4, here, HALF), plan(INT4, here, replace(HALF, prefill_piece=PIECES[0]))
        assert free.layers_on_card == small.layers_on_card
    assert plan(INT4, machine(24), HALF).piece == max(PIECES)
    assert plan(INT4, machine(), HALF).piece == PIECE
    assert plan(INT4, machine(24), replace(HALF, prefill_piece=77)).piece == 77


def test_a_lost_layer_tells_what_would_bring_it_back() -> None:
    for vram, less in ((5.3, (8, "fp16")), (4.8, (8, "int8")), (6, None), (3, None)):
        found = lighter(INT4, plan(INT4, machine(vram), HALF))
        assert (found and (found.head_bits, found.kv_cache)) == less
    wide = ModelSize.of(SHAPES["chatglm-6b-int4-qe"])  # its head has few bits already
    found = lighter(wide, plan(wide, machine(4.5), HALF))
    assert found
    assert (found.head_bits, found.kv_cache) == (16, "int8")
    assert lighter(INT4, plan(INT4, machine(5.3), replace(HALF, layers_on_gpu=3))) is None


def test_the_piece_of_a_cpu_is_the_models() -> None:
    from glmui.glm import parts

    assert parts.Network.piece == PIECE


def test_what_is_asked_for_is_done_and_what_is_short_is_said() -> None:
    few = plan(INT4, machine(24), PlanRequest(layers_on_gpu=5))
    assert (few.layers_on_card, few.reason) == (5, "spread")
    none = plan(INT4, machine(24), PlanRequest("mixed", layers_on_gpu=0))
    assert (none.layers_on_card, none.reason) == (0, "cpu_asked")
    many = plan(INT4, machine(4), PlanRequest(layers_on_gpu=28))
    assert many.layers_on_card == 28
    assert many.short["cuda:0"] > 1e9
    second = plan(INT4, machine(0.5, 4), PlanRequest(layers_on_gpu=28))
    assert set(second.layers) == {"cuda:1"}, "what does not fit goes where something does"
    asked = plan(INT4, machine(4), PlanRequest("cuda:0"))
    assert asked.layers_on_card == 28
    assert asked.short
    assert plan(INT4, machine(24), PlanRequest("cpu")).reason == "cpu_asked"
    assert plan(INT4, machine(ram=4), PlanRequest()).short[CPU] > 0
    with pytest.raises(InvalidInput, match="cuda:1"):
        plan(INT4, machine(6), PlanRequest("cuda:1"))
    with pytest.raises(InvalidInput):
        plan(INT4, machine(), PlanRequest("mixed"))
    for wrong in ({"context": 0}, {"layers_on_gpu": -1}, {"vram_reserve": -1}, {"prefill_piece": -5}):
        with pytest.raises(InvalidInput):
            PlanRequest(**wrong)  # type: ignore[arg-type]


def test_float16_on_a_cpu_becomes_float32_and_is_short() -> None:
    whole = ModelSize.of(SHAPES["chatglm-6b"])
    found = plan(whole, machine(ram=16), HALF)
    assert found.ram > 23e9
    assert found.short[CPU] > 6e9
    assert found.mapped < 1.1e9, "only the embedding stays in its file"
    assert not plan(ModelSize.of(SHAPES["chatglm-6b"], 4), machine(ram=16), HALF).short


def test_the_context_that_fits_is_the_longest_that_does() -> None:
    here, asked = machine(6), PlanRequest("cuda", context=8192)
    fits = context_that_fits(INT4, here, asked)
    assert not plan(INT4, here, PlanRequest("cuda", context=fits)).short
    assert plan(INT4, here, PlanRequest("cuda", context=fits + 1)).short
    assert context_that_fits(INT4, machine(2), PlanRequest("cuda")) == 0
    assert context_that_fits(INT4, machine(24), asked) == 8192


@pytest.mark.parametrize("cards", [(), (4,), (5.3,), (6,), (24,), (4, 4)])
def test_the_room_is_the_longest_that_this_plan_holds(cards: tuple[float, ...]) -> None:
    found = plan(INT4, machine(*cards), replace(HALF, context=512))
    longest = context_of(INT4, found, 100_000)

    def overfull(context: int) -> bool:
        on = bytes_on(INT4, replace(found.request, context=context), Counter(found.layers))
        return any(need > budget(found.machine, found.request, device) for device, need in on.items())

    assert 512 <= longest < 100_000
    assert (overfull(longest), overfull(longest + 1)) == (False, True)


def test_missing_ram_for_pages_of_files_alone_takes_nothing_from_what_was_planned() -> None:
    """Nobody is ended for it: an 8 GB laptop has the 2,048 tokens that it was promised, if slowly."""
    rooms = []
    for quarters in range(8, 32):
        found = plan(INT4, machine(ram=quarters / 4), HALF)
        rooms.append(room(SPEC, INT4, found))
        if found.slow:
            assert found.works
            assert rooms[-1] > LEAST_CONTEXT
            private = bytes_on(INT4, replace(found.request, context=rooms[-1]), Counter(found.layers))[CPU]
            assert private - found.mapped <= found.machine.ram
    assert rooms == sorted(rooms), "more RAM never means less room"
    for ram in (4, 4.25, 4.5, 5):
        short = plan(INT4, machine(ram=ram), HALF)
        assert short.slow
        assert room(SPEC, INT4, short) == 2048
    long = ModelSize.of(SHAPES["chatglm2-6b-int4"])
    slow = plan(long, machine(ram=4), HALF)
    assert slow.slow
    assert room(SPEC, long, slow) == 2048, "what is missing lets no conversation grow beyond what was planned"


def test_what_is_packed_in_memory_is_missing_for_good() -> None:
    """Without files to keep the CPU kernels' copies in, and for weights that are quantised while they load,
    only the float16 table is pages of a file."""
    fresh = ModelSize.of(SHAPES["chatglm-6b"], 4)
    for size, spec in ((INT4, replace(SPEC, packed_dir="")), (fresh, replace(SPEC, packed_dir="p"))):
        found = plan(size, machine(ram=3.5), replace(request_of(spec), device=CPU))
        assert found.mapped == size.head_bytes(CPU, 16)
        assert not found.works
        assert slow_context(size, found) < 1024, "of 2,048 that pages of files would leave"
    kept = plan(INT4, machine(ram=3.5), replace(request_of(replace(SPEC, packed_dir="p")), device=CPU))
    assert kept.slow
    small_head = plan(INT4, machine(ram=3.5), replace(kept.request, head_bits=8, packed=False))
    assert small_head.mapped == 0, "the kernels' head is a copy"


def test_beside_a_card_it_is_the_same_and_the_cards_memory_is_a_bound() -> None:
    found = plan(INT4, machine(3, ram=3.8), replace(HALF, device="mixed"))
    assert found.layers_on_card
    assert found.slow
    assert room(SPEC, INT4, found) == 2048
    less = plan(INT4, machine(3, ram=2), replace(HALF, device="mixed"))
    assert not less.works
    some = slow_context(INT4, less)
    assert LEAST_CONTEXT < some < 2048
    assert plan(INT4, less.machine, replace(less.request, context=some)).slow
    none = plan(INT4, machine(3, ram=1), replace(HALF, device="mixed"))
    assert none.short[CPU] > none.mapped
    assert not none.works
    assert longest_context(INT4, none, 2048) == 0
    full = plan(INT4, machine(3, ram=3.8), replace(HALF, device="mixed", layers_on_gpu=28))
    assert not full.works
    assert longest_context(INT4, full, 2048) == 0


def test_each_layer_counts_as_it_is() -> None:
    """The second half of a model with 8 bits in it: as many layers as fit, and the rest weighs more."""
    forms = Forms(0, {(layer, part): 8 for layer in range(14, 28) for part in PARTS})
    mixed, here = ModelSize.of(SHAPES["chatglm-6b-int4"], forms=forms), machine(4)
    asked = replace(HALF, prefill_piece=128)
    found, usual = plan(mixed, here, asked), plan(INT4, here, asked)
    heavier = mixed.layer_bytes("cuda:0", 27) - mixed.layer_bytes("cuda:0", 0)
    assert heavier == INT4.stored[0]
    each = INT4.layer_bytes("cuda:0") + INT4.cache_bytes("cuda:0", 2048, "fp16")
    fewer, heavy = usual.layers_on_card - found.layers_on_card, found.layers_on_card - 14
    assert found.vram == usual.vram - fewer * each + heavy * heavier
    assert 14 < found.layers_on_card < usual.layers_on_card
    assert found.mapped == heavier * 2 * (28 - found.layers_on_card)


def test_several_cards_share_so_that_a_conversation_can_grow() -> None:
    found = plan(INT4, machine(4, 4), replace(HALF, context=512))
    assert Counter(found.layers) == {"cuda:0": 15, "cuda:1": 13}
    assert context_of(INT4, found, 2048) == 2048
    small = plan(INT4, machine(2, 6, 2), HALF)
    assert set(small.layers) == {"cuda:1"}, "a card is no use where one does for all, and more are slower"


def test_a_specs_wishes() -> None:
    asked = request_of(SPEC)
    assert (asked.device, asked.context, asked.kv_cache) == ("auto", 2048, "fp16")
    assert asked.vram_reserve == SPEC.vram_reserve
    assert request_of(replace(SPEC, cpu_precision="exact")).kv_cache == "auto"
    assert request_of(replace(SPEC, kv_cache="int8", head_bits=8)).kv_cache == "int8"
    assert request_of(replace(SPEC, layers_on_gpu=3)).layers_on_gpu is None, "only mixed goes by it"
    assert request_of(replace(SPEC, device="mixed", layers_on_gpu=3)).layers_on_gpu == 3
    assert request_of(replace(SPEC, context_most=700)).context == 700


def test_the_room_has_its_bounds() -> None:
    roomy, tight = plan(INT4, machine(24), HALF), plan(INT4, machine(2), replace(HALF, device="cuda"))
    assert room(SPEC, INT4, roomy) == 2048, "what the model was trained for"
    assert room(replace(SPEC, context=3000), INT4, roomy) == 3000, "or is to hold all the same"
    assert room(replace(SPEC, context_most=900), INT4, roomy) == 900
    assert room(SPEC, INT4, tight) == LEAST_CONTEXT
    assert room(replace(SPEC, context_most=100), INT4, tight) == 100
    long = ModelSize.of(SHAPES["chatglm2-6b-int4"])
    assert 2048 < room(SPEC, long, plan(long, machine(6), HALF)) <= most_tokens(SPEC, long) == 32768


# The command


def command(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> tuple[int, str]:
    code = main(["plan", "--data-dir", str(folder), "--ram", "16", *flags])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_command_plans_for_any_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said = command(capsys, tmp_path, "--model", "chatglm-6b-int4", "--vram", "6", "--json")
    told = json.loads(said)
    assert code == 0
    assert told["layers_on_gpu"] == len(told["layers"]) == 28
    assert 4.8 < told["predicted_vram_gb"] < 5.3
    assert told["predicted_ram_gb"] > 0
    assert (told["reason"], told["room"], told["prefill_piece"]) == ("one_card", 2048, 1024)
    assert "28" in told["explanation"]
    assert {"layer", "device", "mb"} <= told["layers"][0].keys()
    code, said = command(capsys, tmp_path, "--model", "chatglm-6b-int4", "--vram", "4", "--vram", "4")
    assert code == 0
    assert "layers 15 to 27" in said
    small = ("--vram", "4.8", "--head-bits", "8", "--kv-cache", "int8", "--vram-reserve-gb", "0.4")
    code, said = command(capsys, tmp_path, "--model", "chatglm-6b-int4", *small)
    assert "All 28 layers" in said
    assert "row by row" in said


def test_the_command_says_what_is_short_and_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command(capsys, tmp_path, "--model", "chatglm-6b", "--vram", "0")[0] == 1
    code, said = command(capsys, tmp_path, "--model", "chatglm-6b", "--vram", "0", "--quantize", "int4")
    assert code == 0
    five = ("--model", "chatglm-6b-int4", "--vram", "5.3")
    assert "head_bits = 8" in command(capsys, tmp_path, *five)[1]
    code, said = command(capsys, tmp_path, *five, "--device", "cuda:0")
    assert code == 1
    assert "--context 1" in said
    code, said = command(capsys, tmp_path, "--model", "chatglm-6b-int4", "--vram", "0", "--ram", "4")
    assert code == 1
    assert "from the disk" in said
    assert "RAM: " in said
    code, said = command(capsys, tmp_path, *five[:2], "--vram", "4", "--layers-on-gpu", "28")
    assert code == 1
    assert "--device auto: 16 of 28" in said
    assert "cuda:0: 1.6" in said
    code, said = command(capsys, tmp_path, *five, "--layers-on-gpu", "3")
    assert "3 of 28" in said


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--model", "nobody"), "chatglm3-6b-int4"),
        (("--model", "echo"), "chatglm3-6b-int4"),
        (("--model", "chatglm-6b", "--vram", "nan"), "--vram"),
        (("--model", "chatglm-6b", "--context", "3"), "--context"),
        (("--model", "chatglm-6b", "--layers-on-gpu", "-1"), "--layers-on-gpu"),
        (("--model", "chatglm-6b", "--vram-reserve-gb", "-1"), "--vram-reserve-gb"),
        (("--model", "chatglm-6b", "--vram", "0", "--layers-on-gpu", "2"), "no graphics card"),
        (("--model", "chatglm-6b", "--vram", "6", "--device", "cuda:3"), "cuda:3"),
        ((), "--model"),
    ],
)
def test_the_command_refuses(
    flags: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, said = command(capsys, tmp_path, *flags)
    assert code == 2
    assert word in said


def test_the_command_reads_a_folder(
    tiny_chatglm: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(tiny_chatglm("int8"))
    code, said = command(capsys, tmp_path, "--model", folder, "--vram", "6", "--json")
    assert code == 0
    assert json.loads(said)["predicted_vram_gb"] < 0.2
