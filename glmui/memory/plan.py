"""Which part of a ChatGLM goes where, how much memory that takes, and why. Arithmetic alone: no torch.

Decoding is as fast as memory is read, and a card reads several times faster than a CPU: so as many layers
as fit go on the cards, in their order, and the rest stays on the CPU. The last norm and the output head go
with the first card that is used, since every token passes through them, and so does the embedding, unless
the head is quantised by itself: then it stays in its file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from glmui.errors import InvalidInput
from glmui.memory.model_size import CPU, ModelSize
from glmui.memory.plan_request import PIECES, Machine, PlanRequest, budget
from glmui.memory.spread import exactly, fill, need
from glmui.types import PIECE

# What Python, torch and the tokenizer take of RAM before any weight; and with them CUDA's libraries.
PROCESS = 500_000_000
PROCESS_WITH_CARD = 1_500_000_000


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
    counts = fill(size, request, {name: budget(machine, request, name) for name in names})
    if request.layers_on_gpu is not None:
        counts = exactly(counts, min(request.layers_on_gpu, size.layers), names[0])
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


def _why(counts: Mapping[str, int], layers: int) -> str:
    if not counts:
        return "card_too_small"
    if sum(counts.values()) < layers:
        return "spread"
    return "one_card" if len(counts) == 1 else "several_cards"


def bytes_on(size: ModelSize, request: PlanRequest, counts: Mapping[str, int]) -> dict[str, int]:
    """Bytes by device. counts: layers by device, in their order."""
    head = next(iter(counts))
    on = {CPU: program_bytes(head)}
    first = 0
    for name, count in counts.items():
        layers = range(first, first + count)
        on[name] = on.get(name, 0) + need(size, request, name, layers, name == head)
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
        mapped=size.mapped_bytes(on_cpu, head == CPU, request.head_bits, request.packed),
        machine=machine,
        request=request,
        reason=reason,
    )
