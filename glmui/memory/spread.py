"""How many of a model's layers each card takes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import replace

from glmui.memory.model_size import ModelSize
from glmui.memory.plan_request import PlanRequest


def fill(size: ModelSize, request: PlanRequest, rooms: Mapping[str, int]) -> dict[str, int]:
    """How many layers each card takes of its room in bytes, as many as fit.

    Where all are on several cards, they lie as they would for the longest context of which that is true: a
    first card that is filled to its brim would leave a conversation no room to grow.
    """
    counts = _most_on_each(size, request, rooms)
    if len(counts) < 2 or sum(counts.values()) < size.layers:
        return counts

    def holds(context: int) -> bool:
        return sum(_most_on_each(size, replace(request, context=context), rooms).values()) == size.layers

    context = longest(holds, max(request.context, size.positions))
    return _most_on_each(size, replace(request, context=context), rooms)


def _most_on_each(size: ModelSize, request: PlanRequest, rooms: Mapping[str, int]) -> dict[str, int]:
    """How many layers each card takes, the first one the head too. One without room is left out."""
    counts: dict[str, int] = {}
    for name, room in rooms.items():
        if count := _most(size, request, name, sum(counts.values()), room):
            counts[name] = count
    return counts


def _most(size: ModelSize, request: PlanRequest, device: str, first: int, room: int) -> int:
    """How many layers, from `first` on, a card has room for; layer 0 comes with the head."""
    return longest(
        lambda count: need(size, request, device, range(first, first + count), first == 0) <= room,
        size.layers - first,
    )


def longest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where all smaller ones do too; 0 for none."""
    return bisect_left(range(1, most + 1), True, key=lambda count: not fits(count))


def exactly(counts: Mapping[str, int], wanted: int, first: str) -> dict[str, int]:
    """Exactly `wanted` layers on cards: where there is room first, and what has none on the first card."""
    cut: dict[str, int] = {}
    for name, count in counts.items():
        cut[name] = min(count, wanted - sum(cut.values()))
    if missing := wanted - sum(cut.values()):
        first = next(iter(cut), first)
        cut[first] = cut.get(first, 0) + missing
    return {name: count for name, count in cut.items() if count}


def need(size: ModelSize, request: PlanRequest, device: str, layers: range, with_head: bool) -> int:
    """Bytes that neighbouring layers take on a device, with what working on them takes."""
    cache = len(layers) * size.cache_bytes(device, request.context, request.kv_cache)
    head = size.head_bytes(device, request.head_bits) if with_head else 0
    scratch = size.scratch_bytes(device, request.context, request.kv_cache, request.prefill_piece)
    return size.layers_bytes(device, layers) + cache + head + scratch
