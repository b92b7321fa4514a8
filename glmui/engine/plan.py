"""Which part of a ChatGLM goes where, how much memory that takes, and why. Arithmetic alone: no torch.

Decoding is as fast as memory is read, and a card reads several times faster than a CPU: so as many layers
as fit go on the cards, in their order, and the rest stays on the CPU. The embedding, the last norm and the
output head go with the first card that is used, since every token passes through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from glmui.errors import InvalidInput
from glmui.glm.config import AnyConfig, GLMConfig

CPU = "cpu"
GIB = 2**30

# What a CUDA context takes beside the tensors: driver, kernels, cuBLAS. Not counted by torch's allocator.
CUDA_CONTEXT = 400_000_000
# What Python, torch and the tokenizer take of RAM before any weight.
PROCESS = 500_000_000
# Tokens of a long prompt that are worked on at a time: glm.parts.PIECE, which this module must not import.
PIECE = 256


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model in numbers. Counts are of numbers, not bytes; `layer_` ones are of one layer.

    bits: of the weights in a layer, 4, 8 or 16. table_bits: of embedding and output head.
    layer_floats: biases, norms and scales. layer_cache: keys and values of one token.
    """

    layers: int
    bits: int
    layer_weights: int
    layer_floats: int
    layer_cache: int
    table_weights: int
    table_bits: int
    width: int
    inner: int
    heads: int
    vocab: int

    @classmethod
    def of(cls, config: AnyConfig, bits: int = 0) -> ModelSize:
        """bits: what FP16 weights are quantised to while loading, 0 for nothing."""
        stored = config.quantization_bit or bits or 16
        width = config.hidden_size
        if isinstance(config, GLMConfig):
            inner = config.inner_hidden_size
            rows = 5 * width + inner
            floats = rows + 4 * width
            quantised_table = config.quantization_embeddings
        else:
            inner = 2 * config.ffn_hidden_size
            rows = config.qkv_width + 2 * width + inner
            floats = config.qkv_width + 2 * width
            quantised_table = False
        return cls(
            layers=config.num_layers,
            bits=stored,
            layer_weights=config.block_weights,
            layer_floats=floats + (rows if stored < 16 else 0),
            layer_cache=2 * config.kv_heads * config.head_size,
            table_weights=config.table_weights,
            table_bits=stored if quantised_table else 16,
            width=width,
            inner=inner,
            heads=config.num_attention_heads,
            vocab=config.vocab_size,
        )

    def layer_bytes(self, device: str, context: int) -> int:
        """One layer with its part of the KV cache, for `context` tokens."""
        float_size = float_bytes(device)
        weights = self.layer_weights * (self.bits if self.bits < 16 else 8 * float_size) // 8
        return weights + (self.layer_floats + self.layer_cache * context) * float_size

    def table_bytes(self) -> int:
        """Embedding and output head, which stay in float16 everywhere, with the last norm."""
        return self.table_weights * self.table_bits // 8 + 8 * self.width

    def scratch_bytes(self, device: str, context: int) -> int:
        """The most that reading a prompt of `context` tokens takes beside weights and cache."""
        float_size = float_bytes(device)
        whole = 4 * context * self.width  # hidden states before and after a layer, queries
        in_piece = PIECE * (8 * self.width + 2 * self.inner + 2 * context * self.heads)
        return (whole + in_piece) * float_size + 3 * self.vocab * 4


def float_bytes(device: str) -> int:
    """A card computes in float16, a CPU in float32."""
    return 4 if device == CPU else 2


@dataclass(frozen=True, slots=True)
class Machine:
    """What is free, in bytes: on each card, and of RAM."""

    cards: tuple[int, ...]
    ram: int


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for.

    device: "auto", "cpu", "cuda", "cuda:N" or "mixed". context: tokens that the KV cache must hold.
    layers_on_card: how many, None for as many as fit. reserve: bytes of each card to leave to others.
    """

    device: str = "auto"
    context: int = 2048
    layers_on_card: int | None = None
    reserve: int = 500_000_000

    def __post_init__(self) -> None:
        if self.context < 1:
            raise InvalidInput("out_of_bounds", name="context", value=self.context, low=1, high="")


@dataclass(frozen=True, slots=True)
class Plan:
    """layers: the device of each. table: the device of embedding, last norm and output head.

    on: bytes by device, all counted (on a card as torch's allocator counts: without CUDA_CONTEXT).
    short: bytes that are missing, by device; empty where the plan fits. reason: a key of the locales' "plan".
    """

    layers: tuple[str, ...]
    table: str
    on: dict[str, int]
    short: dict[str, int]
    reason: str

    @property
    def layers_on_card(self) -> int:
        return sum(device != CPU for device in self.layers)

    @property
    def vram(self) -> int:
        return sum(size for device, size in self.on.items() if device != CPU)

    @property
    def ram(self) -> int:
        return self.on[CPU]


def plan(size: ModelSize, machine: Machine, wish: Wish) -> Plan:
    """The fastest way to hold the model, and what it is short of where it does not fit.

    Raises InvalidInput("device_missing") for a card that is not there.
    """
    names = _cards(machine, wish)
    if not names:
        return _settled(size, machine, wish, [], "cpu_asked" if machine.cards else "no_card")
    if wish.device.startswith("cuda"):
        return _settled(size, machine, wish, names * size.layers, "card_asked")
    rooms = {name: machine.cards[_number(name)] - CUDA_CONTEXT - wish.reserve for name in names}
    counts = _fill(size, wish.context, rooms)
    if wish.layers_on_card is not None:
        counts = _cut(counts, min(wish.layers_on_card, size.layers), names[0])
    devices = [name for name, count in counts.items() for _ in range(count)]
    return _settled(size, machine, wish, devices, _why(devices, size.layers))


def _cards(machine: Machine, wish: Wish) -> list[str]:
    """The cards that may be used, in their order."""
    names = [f"cuda:{n}" for n in range(len(machine.cards))]
    if wish.device == CPU or (wish.device == "auto" and not names):
        return []
    if wish.device in ("auto", "mixed", "cuda") and names:
        return names[:1] if wish.device == "cuda" else names
    if wish.device in names:
        return [wish.device]
    raise InvalidInput("device_missing", device=wish.device, available=", ".join([*names, CPU]))


def _number(card: str) -> int:
    return int(card.partition(":")[2])


def _fill(size: ModelSize, context: int, rooms: dict[str, int]) -> dict[str, int]:
    """How many layers each card takes, the first one the table too. One without room is left out."""
    counts: dict[str, int] = {}
    table, layers = size.table_bytes(), size.layers
    for name, room in rooms.items():
        left = room - size.scratch_bytes(name, context) - table
        count = min(layers, max(0, left // size.layer_bytes(name, context)))
        if count:
            counts[name] = count
            layers -= count
            table = 0
    return counts


def _cut(counts: dict[str, int], wanted: int, first: str) -> dict[str, int]:
    """Exactly `wanted` layers on cards: where there is room first, and what has none on the first card."""
    cut: dict[str, int] = {}
    for name, count in counts.items():
        cut[name] = min(count, wanted - sum(cut.values()))
    if missing := wanted - sum(cut.values()):
        cut[first] = cut.get(first, 0) + missing
    return {name: count for name, count in cut.items() if count}


def _why(devices: Sequence[str], layers: int) -> str:
    if not devices:
        return "card_too_small"
    if len(devices) < layers:
        return "spread"
    return "one_card" if len(set(devices)) == 1 else "several_cards"


def _settled(size: ModelSize, machine: Machine, wish: Wish, on_cards: list[str], reason: str) -> Plan:
    """The plan with its bytes. on_cards: the card of each of the first layers; the others are on the CPU."""
    layers = [*on_cards, *[CPU] * (size.layers - len(on_cards))]
    on = {CPU: PROCESS, **dict.fromkeys(on_cards, 0)}
    for device in layers:
        on[device] += size.layer_bytes(device, wish.context)
    table = layers[0]
    on[table] += size.table_bytes()
    for device in set(layers):
        on[device] += size.scratch_bytes(device, wish.context)
    free = {CPU: machine.ram}
    for name in set(on_cards):
        free[name] = machine.cards[_number(name)] - CUDA_CONTEXT - wish.reserve
    short = {device: need - free[device] for device, need in on.items() if need > free[device]}
    return Plan(tuple(layers), table, on, short, reason)


def context_that_fits(size: ModelSize, machine: Machine, wish: Wish) -> int:
    """The most tokens, up to those wished for, that such a plan has room for; 0 for none."""
    whole = plan(size, machine, wish)
    if not whole.short:
        return wish.context
    fits, fails = 0, wish.context
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if plan(size, machine, replace(wish, context=middle)).short:
            fails = middle
        else:
            fits = middle
    return fits
