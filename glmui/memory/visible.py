"""Which of a machine's cards torch sees, and by what names: NVML counts all, torch those that it may use.

torch's numbers go by the place on the bus (by itself it would have the fastest card first, so our processes
that compute are told otherwise: engine/own_process.py), NVML's do so as a rule. CUDA_VISIBLE_DEVICES may hide
cards and change their order: by their numbers, or by what their names (NVML's UUIDs) begin with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from glmui.meter import Card
from glmui.types import EngineInfo

_NUMBER = re.compile(r"\s*\+?(\d+)")  # what comes after it is not read
PART = Card(-1, "MIG", None, None, None)  # of a card; how much memory it has is not known


def visible(cards: Sequence[Card], environ: Mapping[str, str] = os.environ) -> dict[str, Card]:
    """The cards that torch sees, under its names, in its order: {"cuda:0": …}.

    A part of a card (MIG) that is asked for stands there as PART. Where cards are asked for by
    name, and NVML has not told their names, all are taken for visible.
    """
    wish = environ.get("CUDA_VISIBLE_DEVICES")
    there = sorted(cards, key=lambda card: card.bus) if all(card.bus for card in cards) else cards
    seen = there if wish is None else list(_chosen(there, wish.split(",")))
    twice = len({id(card) for card in seen}) < len(seen)  # then CUDA shows none
    return {} if twice else {f"cuda:{number}": card for number, card in enumerate(seen)}


def in_use(cards: Sequence[Card], info: EngineInfo, environ: Mapping[str, str] = os.environ) -> list[Card]:
    """Those of the cards that a model computes on."""
    return [card for name, card in visible(cards, environ).items() if name in {info.device, *info.layers}]


def held_by(
    cards: Sequence[Card], engine: EngineInfo | None, environ: Mapping[str, str] = os.environ
) -> list[Card]:
    """Those of the cards of which the engine may hold something. Where no driver tells whose memory is whose
    (Windows), these are the ones that it says it computes on."""
    if engine is None:
        return []
    computing = in_use(cards, engine, environ)
    return [card for card in cards if card.own is not None or card in computing]


def _chosen(cards: Sequence[Card], wishes: Sequence[str]) -> Iterator[Card]:
    """Up to the first wish that nothing comes of, as CUDA has it."""
    if wishes[0].startswith("MIG-"):
        yield PART  # CUDA shows one, however many are asked for
        return
    by_name = wishes[0].startswith("GPU-")
    if by_name and not all(card.uuid for card in cards):
        yield from cards
        return
    for wish in wishes:
        meant = _named(cards, wish) if by_name else _numbered(cards, wish)
        if len(meant) != 1:
            return
        yield meant[0]


def _named(cards: Sequence[Card], wish: str) -> list[Card]:
    return [card for card in cards if wish.startswith("GPU-") and card.uuid.startswith(wish)]


def _numbered(cards: Sequence[Card], wish: str) -> list[Card]:
    number = _NUMBER.match(wish)
    return [*cards[int(number[1]) :][:1]] if number else []
