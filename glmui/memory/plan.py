"""Which part of a ChatGLM goes where, how much memory that takes, and why. Arithmetic alone: no torch.

Decoding is as fast as memory is read, and a card reads several times faster than a CPU: so as many layers
as fit go on the cards, in their order, and the rest stays on the CPU. The last norm and the output head go
with the first card that is used, since every token passes through them, and so does the embedding, unless
the head is quantised by itself: then it stays in its file.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from glmui.errors import InvalidInput
from glmui.memory.model_size import CPU, ModelSize
from glmui.types import PIECE

GIB = 2**30

# What a CUDA context takes beside the tensors: driver, kernels, and what torch's allocator cannot use of
# what it took. Not counted as allocated.
CUDA_CONTEXT = 400_000_000
# What Python, torch and the tokenizer take of RAM before any weight; and with them CUDA's libraries.
PROCESS = 500_000_000
PROCESS_WITH_CARD = 1_500_000_000
# Tokens of a long prompt that are worked on at a time. Many are faster on a card, few need less memory; on a
# CPU more than PIECE are no faster, and Stop waits for them.
PIECES = (128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Machine:
    """What is free, in bytes: on each card, and of RAM."""

    cards: tuple[int, ...]
    ram: int


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is asked for, in the words of EngineSpec.

    device: "auto", "cpu", "cuda", "cuda:N" or "mixed". context: tokens that the KV cache must hold.
    layers_on_gpu: how many, None for as many as fit. vram_reserve: bytes of each card to leave to others.
    head_bits: 8 for an output head that is quantised by itself. kv_cache: what keys and values are kept in,
    "fp16", "bf16", "int8", or "auto" and "fp32" for what a layer computes in. prefill_piece: tokens of a
    prompt to read at a time, 0 for the plan's choice.
    """

    device: str = "auto"
    context: int = 2048
    layers_on_gpu: int | None = None
    vram_reserve: int = 500_000_000
    head_bits: int = 16
    kv_cache: str = "auto"
    prefill_piece: int = 0

    def __post_init__(self) -> None:
        for name, least in (("context", 1), ("layers_on_gpu", 0), ("vram_reserve", 0), ("prefill_piece", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidInput("out_of_bounds", name=name, value=value, low=least, high="")


@dataclass(frozen=True, slots=True)
class Plan:
    """layers: the device of each. head: that of the last norm and the output head. embedding: its own.

    on: bytes by device, all counted (on a card as torch's allocator counts: without CUDA_CONTEXT). mapped:
    bytes on the CPU that are pages of files: the system takes them when it needs them and reads them again,
    which is slow, but nobody is ended for it. machine, request: what it was made for; the request has the
    piece that was chosen. reason: a key of the locales' "plan".
    """

    layers: tuple[str, ...]
    head: str
    embedding: str
    on: Mapping[str, int]
    mapped: int
    machine: Machine
    request: PlanRequest
    reason: str

    @property
    def short(self) -> dict[str, int]:
        """Bytes that are missing, by device; empty where the plan fits."""
        budgets = {name: budget(self.machine, self.request, name) for name in self.on}
        return {name: need - budgets[name] for name, need in self.on.items() if need > budgets[name]}

    @property
    def slow(self) -> bool:
        """Whether nothing is short but RAM for pages of files: it works, reading them again and again."""
        return set(self.short) == {CPU} and self.short[CPU] <= self.mapped

    @property
    def works(self) -> bool:
        """Whether there is memory for it, if only for a slow one."""
        return not self.short or self.slow

    @property
    def piece(self) -> int:
        return self.request.prefill_piece

    @property
    def layers_on_card(self) -> int:
        return sum(device != CPU for device in self.layers)

    @property
    def vram(self) -> int:
        return sum(size for device, size in self.on.items() if device != CPU)

    @property
    def ram(self) -> int:
        return self.on[CPU]


def plan(size: ModelSize, machine: Machine, request: PlanRequest) -> Plan:
    """The fastest way to hold the model, and what it is short of where it does not fit.

    Raises InvalidInput for a card that is not there: "device_missing", or "no_card_for_layers" for "mixed".
    """
    pieces = (request.prefill_piece,) if request.prefill_piece else PIECES
    requests = (replace(request, prefill_piece=piece) for piece in pieces)
    return max((_with_piece(size, machine, each) for each in requests), key=_merit)


def _merit(found: Plan) -> tuple[int, int, int]:
    """What comes first: that it fits, then layers on cards, then long pieces. The first of equals wins."""
    longest = PIECE if CPU in found.layers else max(PIECES)
    return -sum(found.short.values()), found.layers_on_card, min(found.piece, longest)


def _with_piece(size: ModelSize, machine: Machine, request: PlanRequest) -> Plan:
    names = _cards(machine, request)
    if not names or request.layers_on_gpu == 0:
        return _settled(size, machine, request, {}, "cpu_asked" if machine.cards else "no_card")
    if request.device.startswith("cuda"):
        return _settled(size, machine, request, {names[0]: size.layers}, "card_asked")
    counts = _fill_well(size, request, {name: budget(machine, request, name) for name in names})
    if request.layers_on_gpu is not None:
        counts = _cut(counts, min(request.layers_on_gpu, size.layers), names[0])
    return _settled(size, machine, request, counts, _why(counts, size.layers))


def _cards(machine: Machine, request: PlanRequest) -> list[str]:
    """The cards that may be used, in their order."""
    names = [f"cuda:{n}" for n in range(len(machine.cards))]
    if request.device == CPU or (request.device == "auto" and not names):
        return []
    if request.device in ("auto", "mixed", "cuda") and names:
        return names[:1] if request.device == "cuda" else names
    if request.device in names:
        return [request.device]
    if request.device == "mixed":
        raise InvalidInput("no_card_for_layers")
    raise InvalidInput("device_missing", device=request.device, available=", ".join([*names, CPU]))


def budget(machine: Machine, request: PlanRequest, device: str) -> int:
    """Bytes of a device that may be taken; below 0 where others have taken the reserve."""
    if device == CPU:
        return machine.ram
    return machine.cards[int(device.partition(":")[2])] - CUDA_CONTEXT - request.vram_reserve


def _fill(size: ModelSize, request: PlanRequest, rooms: Mapping[str, int]) -> dict[str, int]:
    """How many layers each card takes, the first one the head too. One without room is left out."""
    counts: dict[str, int] = {}
    for name, room in rooms.items():
        if count := _most(size, request, name, sum(counts.values()), room):
            counts[name] = count
    return counts


def _most(size: ModelSize, request: PlanRequest, device: str, first: int, room: int) -> int:
    """How many layers, from `first` on, a card has room for; layer 0 comes with the head."""
    return longest(
        lambda count: _need(size, request, device, range(first, first + count), first == 0) <= room,
        size.layers - first,
    )


def _fill_well(size: ModelSize, request: PlanRequest, rooms: Mapping[str, int]) -> dict[str, int]:
    """The same; where all layers are on several cards, as they lie for the longest context of which that is
    true. A first card that is filled to its brim would leave a conversation no room to grow."""
    counts = _fill(size, request, rooms)
    if len(counts) < 2 or sum(counts.values()) < size.layers:
        return counts

    def holds(context: int) -> bool:
        return sum(_fill(size, replace(request, context=context), rooms).values()) == size.layers

    context = longest(holds, max(request.context, size.positions))
    return _fill(size, replace(request, context=context), rooms)


def longest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where all smaller ones do too; 0 for none."""
    return bisect_left(range(1, most + 1), True, key=lambda count: not fits(count))


def _cut(counts: Mapping[str, int], wanted: int, first: str) -> dict[str, int]:
    """Exactly `wanted` layers on cards: where there is room first, and what has none on the first card."""
    cut: dict[str, int] = {}
    for name, count in counts.items():
        cut[name] = min(count, wanted - sum(cut.values()))
    if missing := wanted - sum(cut.values()):
        first = next(iter(cut), first)
        cut[first] = cut.get(first, 0) + missing
    return {name: count for name, count in cut.items() if count}


def _why(counts: Mapping[str, int], layers: int) -> str:
    if not counts:
        return "card_too_small"
    if sum(counts.values()) < layers:
        return "spread"
    return "one_card" if len(counts) == 1 else "several_cards"


def _need(size: ModelSize, request: PlanRequest, device: str, layers: range, with_head: bool) -> int:
    """Bytes that neighbouring layers take on a device, with what working on them takes."""
    cache = len(layers) * size.cache_bytes(device, request.context, request.kv_cache)
    head = size.head_bytes(device, request.head_bits) if with_head else 0
    scratch = size.scratch_bytes(device, request.context, request.kv_cache, request.prefill_piece)
    return size.layers_bytes(device, layers) + cache + head + scratch


def bytes_on(size: ModelSize, request: PlanRequest, counts: Mapping[str, int]) -> dict[str, int]:
    """Bytes by device. counts: layers by device, in their order."""
    head = next(iter(counts))
    on = {CPU: program_bytes(head)}
    first = 0
    for name, count in counts.items():
        layers = range(first, first + count)
        on[name] = on.get(name, 0) + _need(size, request, name, layers, name == head)
        first += count
    return on


def program_bytes(head: str) -> int:
    """What the program itself takes of RAM beside a model whose head is on that device."""
    return PROCESS if head == CPU else PROCESS_WITH_CARD


def _settled(
    size: ModelSize, machine: Machine, request: PlanRequest, cards: Mapping[str, int], reason: str
) -> Plan:
    """The plan with its bytes. cards: how many layers each takes; the others are on the CPU."""
    on_cpu = size.layers - sum(cards.values())
    counts = {**cards, **({CPU: on_cpu} if on_cpu else {})}
    head = next(iter(counts))
    on = bytes_on(size, request, counts)
    return Plan(
        layers=tuple(name for name, count in counts.items() for _ in range(count)),
        head=head,
        embedding=CPU if size.embedding_apart(request.head_bits) else head,
        on=on,
        mapped=size.mapped_bytes(on_cpu, head == CPU, request.head_bits),
        machine=machine,
        request=request,
        reason=reason,
    )
