"""What to do with less of when memory ran out. Values alone: no process, no torch.

Each rung costs the reader a little more than the one before it: smaller pieces of a prompt (a slower start),
less context, fewer layers on the card (slower replies), the CPU. A rung helps only the memory that ran out:
where that was the RAM, nothing is moved off a card. Every way down ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from glmui import notes
from glmui.errors import EngineError, GlmuiError
from glmui.types import LEAST_CONTEXT, PIECE, EngineInfo, EngineSpec

Phase = Literal["loading", "prefill", "decode"]
Kind = Literal["pieces", "context", "layers", "reserve", "cpu"]

LEAST_PIECE = 64  # tokens
_FIRST_RESERVE, _MOST_RESERVE = 1_000_000_000, 4_000_000_000  # bytes of a card left free


@dataclass(frozen=True, slots=True)
class Trouble:
    """Memory ran out: what was being done, and whose memory it was ("cpu" is the RAM)."""

    stage: Phase
    device: str

    @classmethod
    def of(cls, error: GlmuiError) -> Trouble | None:
        """The trouble that an error tells of; None where it is another kind of error."""
        if error.code != "out_of_memory":
            return None
        stage: Phase = next((s for s in get_args(Phase) if s == error.values.get("stage")), "decode")
        return cls(stage, error.values.get("device", "cpu"))


def at_foot(trouble: Trouble) -> EngineError:
    """What is told where no rung is left: whose memory ran out at what, and what helps there.

    For a card's there is always the CPU, but where the reader has chosen other settings meanwhile.
    """
    case = f"{trouble.stage}_ram" if trouble.device == "cpu" else "card"
    return EngineError("out_of_memory", case=case, stage=trouble.stage, device=trouble.device)


@dataclass(frozen=True, slots=True)
class Rung:
    """kind and values: of the sentences that tell what was changed."""

    spec: EngineSpec
    kind: Kind
    values: dict[str, Any] = field(default_factory=dict)


Step = Callable[[EngineSpec, EngineInfo], Rung | None]


def lower(spec: EngineSpec, info: EngineInfo, trouble: Trouble) -> Rung | None:
    """The next rung below `spec` that may help, or None at the ladder's foot.

    info: what was known of the engine; its family alone where it was still loading.
    """
    for step in _steps(spec, info.family, trouble):
        if rung := step(spec, info):
            return rung
    return None


def _steps(spec: EngineSpec, family: str, trouble: Trouble) -> list[Step]:
    on_card = trouble.device != "cpu" and spec.device != "cpu"
    if family == "causal_lm":  # goes wherever it goes as a whole, and its cache grows with the conversation
        return [_cpu] if on_card else []
    lighter: dict[Phase, list[Step]] = {
        "loading": [],
        "prefill": [_smaller_pieces] if on_card else [_smaller_pieces, _less_context],
        "decode": [_less_context],
    }
    if not on_card:
        return lighter[trouble.stage]
    fewer: list[Step] = [_fewer_layers, _more_reserve] if trouble.device.startswith("cuda") else []
    return [*lighter[trouble.stage], *fewer, _cpu]


def _smaller_pieces(spec: EngineSpec, info: EngineInfo) -> Rung | None:
    """A quarter of them: each rung costs a load."""
    now = spec.prefill_piece or info.prefill_piece or PIECE
    if now <= LEAST_PIECE:
        return None
    piece = max(LEAST_PIECE, now // 4)
    return Rung(replace(_held(spec, info), prefill_piece=piece), "pieces", {"tokens": piece})


def _less_context(spec: EngineSpec, info: EngineInfo) -> Rung | None:
    """Half of it."""
    room = min(filter(None, (spec.context_most, info.context_room)), default=spec.context)
    if room <= LEAST_CONTEXT:
        return None
    most = max(LEAST_CONTEXT, room // 2)
    return Rung(replace(_held(spec, info), context_most=most), "context", {"tokens": most})


def _held(spec: EngineSpec, info: EngineInfo) -> EngineSpec:
    """The spec with its layers where they are now: what is saved on a card must not go to more of them."""
    on_card = sum(device != "cpu" for device in info.layers)
    if _asked(spec) is not None or not 0 < on_card < len(info.layers):
        return spec
    return replace(spec, device="mixed", layers_on_gpu=on_card)


def _asked(spec: EngineSpec) -> int | None:
    """The layers that a card is asked to hold, None where the plan decides."""
    return spec.layers_on_gpu if spec.device == "mixed" else None


def _fewer_layers(spec: EngineSpec, info: EngineInfo) -> Rung | None:
    """A quarter of those on the card goes to the CPU, two at least. Of several cards nobody can tell here
    which one would become emptier: there the plan decides, with a larger reserve."""
    cards = {device for device in info.layers if device != "cpu"}
    count = sum(device != "cpu" for device in info.layers) or _asked(spec) or 0
    left = count - max(2, count // 4)
    if len(cards) > 1 or left < 1:
        return None
    return Rung(replace(spec, device="mixed", layers_on_gpu=left), "layers", {"layers": left})


def _more_reserve(spec: EngineSpec, info: EngineInfo) -> Rung | None:
    """Fewer layers where their number is not known (the model was still loading) or is the plan's affair."""
    reserve = max(2 * spec.vram_reserve, _FIRST_RESERVE)
    if reserve > _MOST_RESERVE or len({*info.layers} - {"cpu"}) == 1 or _asked(spec) is not None:
        return None
    device = spec.device if spec.device in ("auto", "mixed") else "mixed"
    return Rung(replace(spec, device=device, vram_reserve=reserve), "reserve", {"gb": f"{reserve / 1e9:g}"})


def _cpu(spec: EngineSpec, info: EngineInfo) -> Rung:
    """With pieces and context as usual: what they were cut down for was the card."""
    return Rung(replace(spec, device="cpu", layers_on_gpu=None, context_most=0, prefill_piece=0), "cpu")


class Ladder:
    """Where a model stands: the spec that was chosen, and what memory has left of it."""

    def __init__(self, chosen: EngineSpec | None) -> None:
        self.chosen = chosen
        self._rung: Rung | None = None  # the last one taken
        self._untold: dict[Kind, Rung] = {}

    @property
    def spec(self) -> EngineSpec | None:
        """What an engine process is to hold now."""
        if self._rung is None or self.chosen is None:
            return self.chosen
        return replace(self._rung.spec, prefix=self.chosen.prefix, adapter=self.chosen.adapter)

    @property
    def reason(self) -> str:
        """Why the model has less than was chosen, as EngineInfo tells it; "" where it has not."""
        return f"reasons.memory_{self._rung.kind}" if self._rung else ""

    def choose(self, spec: EngineSpec) -> None:
        """Another spec stands at the top again; one that differs in its extras alone stays where it is."""
        if self.chosen is None or spec.base != self.chosen.base:
            self.reset()
        self.chosen = spec

    def lower(self, info: EngineInfo, trouble: Trouble) -> Rung | None:
        """Go one rung down; None, and no step taken, at the ladder's foot."""
        spec = self.spec
        rung = lower(spec, info, trouble) if spec else None
        if rung:
            self._rung = rung
            if rung.kind == "cpu":
                self.told()  # what else was tried on the card is of no interest
            self._untold[rung.kind] = rung
        return rung

    def told(self) -> None:
        """The reader has been told of every rung taken so far."""
        self._untold.clear()

    def news(self) -> str:
        """What the reader must be told of the rungs taken since the last time, as notes."""
        said = [notes.note(f"memory_{kind}", **rung.values) for kind, rung in self._untold.items()]
        self.told()
        return notes.join(*said)

    def reset(self) -> None:
        """Back to the top."""
        self._rung = None
        self.told()
