"""The plain values everything is said in, and the Protocols the floors meet at.

No behaviour lives here beyond checking bounds, and nothing here imports a library.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

from glmui.errors import InvalidInput

Role = Literal["system", "user", "assistant", "observation"]  # observation: what a tool gave (ChatGLM3)
FinishReason = Literal["stop", "length", "cancelled", "error", "interrupted"]
EngineState = Literal["asleep", "loading", "ready", "failed"]
Stage = Literal[
    "fetching", "checking", "converting", "queued", "starting", "compiling", "loading", "packing", "prefill",
    "decode",
]  # fmt: skip

# Bounds of every generation parameter: (lowest, highest). The page, the command line and the
# API all read them here.
BOUNDS: dict[str, tuple[float, float]] = {
    "max_length": (64, 32768),
    "max_new_tokens": (1, 32768),
    "temperature": (0.0, 2.0),
    "top_p": (0.01, 1.0),
    "top_k": (0, 1000),
    "repetition_penalty": (1.0, 2.0),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as the model sees it."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How a reply is generated. Raises InvalidInput when a value is out of BOUNDS.

    max_length: tokens of prompt and reply together.
    max_new_tokens: tokens of the reply alone, or None for no bound but max_length.
    temperature: 0 means greedy. top_k: 0 means off. top_p, repetition_penalty: 1 means off.
    seed: makes sampling repeatable; None draws a fresh one.
    """

    max_length: int = 2048
    max_new_tokens: int | None = None
    temperature: float = 0.95
    top_p: float = 0.7
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is None and name in ("max_new_tokens", "seed"):
                continue
            whole = name not in ("temperature", "top_p", "repetition_penalty")
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not number or math.isnan(value) or not low <= value <= high:
                raise InvalidInput("out_of_bounds", name=name, value=value, low=low, high=high)


@dataclass(frozen=True, slots=True)
class Once:
    """What one reply alone is asked for with. max_new_tokens: None for as the settings have it.
    device: where the model is held for it, "" for where it is always held."""

    max_new_tokens: int | None = None
    device: str = ""


USUAL = Once()


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a reply stands before its first token, or a download. `fraction` is 0..1, None when unknown.

    done, total: bytes of a transfer; per_second: its speed in bytes. All 0 where nothing is transferred.
    """

    stage: Stage
    fraction: float | None = None
    detail: str = ""
    done: int = 0
    total: int = 0
    per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What one reply took. Seconds are wall time; `decode_seconds` runs from the first token to the last."""

    prompt_tokens: int
    completion_tokens: int
    seconds: float
    first_token_seconds: float
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed, or 0.0 where fewer than two tokens came."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """One step of a streaming reply.

    text: what is new, whole characters only. tokens: completion tokens so far.
    progress: set while there is no text yet (loading, prefill).
    finish_reason, usage: set on the last chunk only.
    note: what is to be shown under the reply ("repetition" …; see notes.py), or "".
    """

    text: str = ""
    tokens: int = 0
    progress: Progress | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine is and holds. Bytes, or None where they cannot be told."""

    state: EngineState = "asleep"
    model: str = ""  # as the user named it: "starter", a catalogue name, or a folder
    family: str = ""  # "causal_lm", "chatglm", "echo"
    device: str = ""
    dtype: str = ""
    threads: int = 0
    context_length: int = 0  # tokens the model was trained for; 0 when unknown
    context_room: int = 0  # tokens of prompt and reply that memory has room for; 0 when unknown
    layers: tuple[str, ...] = ()  # the device of each of ChatGLM's layers
    prefill_piece: int = 0  # tokens of a prompt that are read at a time; 0 when unknown
    pid: int | None = None
    reason: str = ""  # why this device and precision: a key of the locales
    kernel: str = ""  # what multiplies quantised weights; "" where torch does
    cpu_precision: str = ""  # its numerics; "" is exact

    @property
    def cards(self) -> list[str]:
        """The NVIDIA cards that hold the model, or a part of it."""
        return sorted({name for name in (self.device, *self.layers) if name.startswith("cuda")})


# Tokens of a long prompt that are worked on at a time where nothing else is said: bounds memory, and how
# long Stop waits.
PIECE = 256
# Tokens of prompt and reply: with less there is no conversation.
LEAST_CONTEXT = 512

# The values of the setting `quantize`, and the bits that each gives a weight; 0 leaves it as it is.
BITS = {"none": 0, "int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Which model an engine is to hold, and how. One engine process holds one spec's model.

    folder: the model's folder, or "echo" for the scripted engine. device: "auto", "cpu", "cuda:0" ….
    threads: None means the physical cores. quantize: "none", "int8" or "int4" while loading.
    cpu_precision: of the activations that meet quantised weights on a CPU (docs/kernels.md).
    head_bits: 16 keeps ChatGLM's output head as it is, 8 quantises it (with the kernels of a CPU or a card;
    on a card the embedding then stays in RAM).
    kv_cache: what ChatGLM's keys and values are kept in; "auto" is fp16, but fp32 on a CPU where
    cpu_precision is exact. "int8" halves fp16, at the price of a little accuracy.
    layers_on_gpu: ChatGLM's layers on cards with device "mixed", None for as many as fit.
    context: tokens that the memory plan keeps room for. context_most: how many a conversation may take at
    most, 0 for as many as there is room for. prefill_piece: tokens of a prompt that are read at a time, 0 for
    the plan's choice. vram_reserve: bytes of each card that are left to others. vram_cap: bytes of each card
    that a ChatGLM's plan looks at as if there were no more, 0 for all.
    chatglm_family: "chatglm2" or "chatglm3" for a folder whose files fit both, else "".
    packed_dir: where weights in the CPU kernels' order are kept, "" for nowhere. kernel_dir: where built
    kernels are kept, "" for the account's cache.
    prefix, adapter: folders of ChatGLM's extras, "" for none.
    hasty: somebody waits, for memory ran out: where RAM has room for it, nothing is done while loading that
    only later loads gain by.
    """

    model: str
    folder: str
    device: str = "auto"
    threads: int | None = None
    quantize: str = "none"
    cpu_precision: Literal["exact", "balanced", "fast"] = "balanced"
    head_bits: int = 16
    kv_cache: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "auto"
    layers_on_gpu: int | None = None
    context: int = 2048
    context_most: int = 0
    prefill_piece: int = 0
    vram_reserve: int = 500_000_000
    vram_cap: int = 0
    chatglm_family: str = ""
    packed_dir: str = ""
    kernel_dir: str = ""
    stop_repetition: bool = True
    prefix: str = ""
    adapter: str = ""
    hasty: bool = field(default=False, compare=False)

    @property
    def base(self) -> EngineSpec:
        """What takes loading: all but the extras, which a loaded model changes between two replies."""
        return replace(self, prefix="", adapter="")

    @property
    def extras(self) -> tuple[str, str]:
        return self.prefix, self.adapter


class ChatEngine(Protocol):
    """Anything that can answer: the local engine process, a model inside it, the scripted echo.

    Calls may come from any thread; one `stream_chat` runs at a time, `cancel` may come meanwhile.
    """

    def info(self) -> EngineInfo: ...

    def stream_chat(
        self, messages: Sequence[Message], params: GenerationParams, request_id: str
    ) -> Iterator[Chunk]:
        """Yield progress, then text, then one last Chunk with finish_reason and usage.

        Loads the model first where it is not loaded. Raises GlmuiError; text yielded before an
        error stays valid. Closing the iterator early cancels the request.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End that request soon with finish_reason "cancelled"; an unknown id does nothing."""
        ...

    def unload(self) -> None:
        """Give the model's memory back; the next `stream_chat` loads again."""
        ...


@runtime_checkable
class TakesExtras(Protocol):
    """An engine whose model may have a prefix or an adapter beside it."""

    def use_extras(self, prefix: str, adapter: str) -> None:
        """Answer with what lies in these folders from now on, "" for none. Between two replies only.

        Raises ModelError where one does not fit the model; then nothing has changed.
        """
        ...


class TokenCounter(Protocol):
    """Counts what a prompt of these messages costs, template and generation prompt included."""

    def __call__(self, messages: Sequence[Message]) -> int: ...


HistoryMode = Literal["fit", "rounds", "tokens"]


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """What one conversation is answered with.

    system: the system text, or "". history: "fit" (as much as max_length holds), "rounds" (the last
    `history_rounds` rounds) or "tokens" (as many whole rounds as fit in `history_tokens`).
    """

    params: GenerationParams = field(default_factory=GenerationParams)
    system: str = ""
    history: HistoryMode = "fit"
    history_rounds: int = 8
    history_tokens: int = 1024

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ChatSettings:
        """Settings out of a saved dict; what it lacks takes the default, what is unknown is passed over."""
        known = {f.name for f in fields(cls)} & set(values)
        inner = values.get("params", {})
        params = GenerationParams(
            **{f.name: inner[f.name] for f in fields(GenerationParams) if f.name in inner}
        )
        return cls(**{**{name: values[name] for name in known}, "params": params})
