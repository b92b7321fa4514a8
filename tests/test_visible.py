"""memory/visible.py: NVML's cards under the names that torch has for them."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from glmui.engine import own_process, torch_facts
from glmui.memory.forecast import machine_of
from glmui.memory.visible import PART, in_use, visible
from glmui.meter import Card, Meter, Reading
from glmui.types import EngineInfo
from tests.test_meter import FakeNvml

GB = 10**9
NAMES = ("GPU-77aa01", "GPU-77bb02", "GPU-88cc03")
CARDS = tuple(Card(n, f"card {n}", 0, (n + 1) * GB, None, uuid) for n, uuid in enumerate(NAMES))


@pytest.mark.parametrize(
    ("wish", "seen"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("1,-1", [1]),
        ("0,2,-1,1", [0, 2]),
        ("-1,1", []),
        ("0,7,1", [0]),  # what comes after one that is not there is hidden
        ("0,0", []),  # one that stands there twice hides all
        (" 1 , 2", [1, 2]),
        ("1gpu", [1]),
        ("none", []),
        ("0,GPU-88", [0]),
        ("GPU-88cc03", [2]),
        ("GPU-88,GPU-77aa", [2, 0]),
        ("GPU-77", []),  # either of two
        ("GPU-77bb,GPU-00", [1]),
        ("GPU-77bb,0", [1]),
        ("GPU-77bb,GPU-77bb02", []),
    ],
)
def test_cards_are_seen_as_cuda_documents_it(wish: str | None, seen: list[int]) -> None:
    environ = {} if wish is None else {"CUDA_VISIBLE_DEVICES": wish}
    found = visible(CARDS, environ)
    assert list(found) == [f"cuda:{number}" for number in range(len(seen))]
    assert [card.index for card in found.values()] == seen


def test_names_that_nvml_does_not_tell_hide_nothing() -> None:
    unnamed = [replace(card, uuid="") for card in CARDS]
    assert [*visible(unnamed, {"CUDA_VISIBLE_DEVICES": "GPU-77aa01"}).values()] == unnamed


def test_numbers_go_by_the_bus() -> None:
    """NVML promises no order of its own."""
    places = ("00000000:88:00.0", "00000000:1A:00.0", "00010000:01:00.0")
    placed = [replace(card, bus=bus) for card, bus in zip(CARDS, places, strict=True)]
    assert [card.index for card in visible(placed, {}).values()] == [1, 0, 2]
    assert [card.index for card in visible(placed, {"CUDA_VISIBLE_DEVICES": "0"}).values()] == [1]
    placed[1] = CARDS[1]  # a card that does not answer
    assert [card.index for card in visible(placed, {}).values()] == [0, 1, 2]


@pytest.mark.parametrize("wish", ["MIG-aa11", "MIG-GPU-77aa01/1/0", "MIG-aa11,MIG-bb22"])
def test_nothing_is_foretold_of_a_part_of_a_card(wish: str) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": wish}
    assert visible(CARDS, environ) == {"cuda:0": PART}
    assert machine_of(Reading(CARDS, 0, GB, None, ""), None, environ) is None


def test_the_meter_tells_names_and_places() -> None:
    class Nvml(FakeNvml):
        def nvmlDeviceGetUUID(self, card: int) -> object:
            return NAMES[card].encode() if card else NAMES[card]

        def nvmlDeviceGetPciInfo(self, card: int) -> object:
            return SimpleNamespace(busId=b"00000000:1A:00.0" if card else "00000000:01:00.0")

    cards = Meter(Nvml()).read(None).cards
    assert [(card.uuid, card.bus[-7:-5]) for card in cards] == [(NAMES[0], "01"), (NAMES[1], "1A")]
    assert [(card.uuid, card.bus) for card in Meter(FakeNvml()).read(None).cards] == [("", ""), ("", "")]


def test_cards_in_use_are_those_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    mixed = EngineInfo(device="mixed", layers=("cuda:1", "cuda:1", "cuda:2", "cpu"))
    assert in_use(CARDS, mixed) == [*CARDS[1:]]
    assert in_use(CARDS, EngineInfo(device="cuda:0")) == [CARDS[0]]
    assert in_use(CARDS, EngineInfo(device="cpu")) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert in_use(CARDS, EngineInfo(device="cuda:0")) == [CARDS[2]]


def test_torch_is_made_to_count_as_nvml_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where somebody wants the fastest first: names on the page would be another card's."""
    monkeypatch.setattr(os, "environ", {"CUDA_DEVICE_ORDER": "FASTEST_FIRST", "OMP_WAIT_POLICY": "ACTIVE"})
    own_process.set_environment()
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_what_the_doctor_asks_counts_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_torch() -> bool:
        return False

    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch_facts, "_import", no_torch)
    torch_facts.run()
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
