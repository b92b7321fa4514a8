"""Family chatglm: ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B from their published folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch

from glmui.engine import device as devices
from glmui.engine.decoders import decoder_of
from glmui.engine.extras import ChatGLMEngine, Extras
from glmui.engine.generate import Speaker
from glmui.engine.loaded import LoadedEngine, told
from glmui.engine.plan import CPU, Machine, ModelSize, Plan, Wish, plan
from glmui.engine.prepare import open_prepared
from glmui.glm.checkpoint import AnyModel, Place, everything_on, load_model
from glmui.glm.config import AnyConfig, read_config
from glmui.text.chatglm import begun_reply
from glmui.text.chatglms import Detokeniser, detokeniser, open_tokenizer, prompt_ids, stops
from glmui.types import BITS, EngineInfo, EngineSpec, Message, Progress

_CONTEXT = 2048  # tokens that a plan keeps room for


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model goes. device: as EngineInfo tells it. reason: a key of the locales' "reasons"."""

    place: Place
    device: str
    dtype: torch.dtype
    reason: str


def placement(wish: str, config: AnyConfig, dtype: torch.dtype | None = None, bits: int = 0) -> Placement:
    """Decide device and dtype. bits: what the weights will have in memory, 0 for float16.

    "auto" and "mixed" follow the plan for the cards that are here and what is free on them now.
    Without a dtype: float32 on a CPU, where it is exact, and float16 on a card, as published.
    Raises InvalidInput("device_missing").
    """
    cards = devices.free_on_cards()
    if wish == "mixed" or (wish == "auto" and cards):
        context = min(_CONTEXT, config.context_length)
        machine = Machine(cards, psutil.virtual_memory().available)
        found = plan(ModelSize.of(config, bits), machine, Wish(wish, context))
        if len({*found.layers}) > 1:
            place = _spread(found, dtype or torch.float16)
            return Placement(place, "mixed", dtype or torch.float16, "reasons.chatglm_mixed")
        wish = found.table
    device = devices.resolve_device(wish)
    dtype = dtype or (torch.float32 if device == "cpu" else torch.float16)
    reason = "reasons.chatglm_cpu" if device == "cpu" else "reasons.card_float16"
    return Placement(everything_on(device, dtype), device, dtype, reason)


def _spread(found: Plan, dtype: torch.dtype) -> Place:
    """Each layer where the plan has it, all else with the first; in float32 what is on the CPU."""

    def place(name: str) -> tuple[torch.device, torch.dtype]:
        _, _, rest = name.partition(".layers.")
        device = found.layers[int(rest.partition(".")[0])] if rest else found.table
        return torch.device(device), torch.float32 if device == CPU else dtype

    return place


def device_map(model: AnyModel) -> Mapping[str, str]:
    """The device of the embedding, each block, the last norm and the output head."""
    parts = dict(model.parts())
    parts.setdefault(model.HEAD, model.get_submodule(model.HEAD))
    return {name: str(next(part.parameters()).device) for name, part in parts.items()}


def cache_dtype(spec: EngineSpec) -> torch.dtype | None:
    """What keys and values are kept in on a CPU; None for what a layer computes in."""
    if spec.kv_cache == "auto":
        return None if spec.cpu_precision == "exact" else torch.float16
    return {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[spec.kv_cache]


def open_chatglm(spec: EngineSpec, on_progress: Callable[[Progress], None]) -> LoadedEngine:
    """Load the model of `spec.folder`, not the extras. Raises ModelError, or InvalidInput for the device."""
    folder = Path(spec.folder)
    config = read_config(folder, spec.chatglm_family)
    tokenizer = open_tokenizer(folder, config.family, config.vocab_size)
    bits = 0 if config.quantization_bit else BITS[spec.quantize]
    where = placement(spec.device, config, bits=bits or config.quantization_bit)
    threads = spec.threads or devices.count_physical_cores()
    torch.set_num_threads(threads)
    stored = bits or config.quantization_bit
    load = partial(load_model, folder, where.place, bits, family=spec.chatglm_family)
    prepared = open_prepared(load, spec, where.device, stored, threads, on_progress)
    if where.device in ("cpu", "mixed"):
        prepared.model.cache_dtype = cache_dtype(spec)
    info = EngineInfo(
        state="ready",
        model=spec.model,
        family="chatglm",
        device=where.device,
        dtype=f"int{stored}" if stored else str(where.dtype).removeprefix("torch."),
        threads=threads,
        context_length=config.context_length,
        reason=prepared.reason or where.reason,
    )
    extras = Extras(prepared.model, folder)  # before the decoder, whose cache a prefix begins
    speaker = Speaker(
        decoder=decoder_of(prepared.model),
        detokeniser=lambda: detokeniser(tokenizer),
        stop_ids=stops(config.family) | {config.eos_token_id},
        stop_repetition=spec.stop_repetition,
        on_progress=on_progress,
    )

    def ask(messages: Sequence[Message]) -> tuple[list[int], Callable[[], Detokeniser]]:
        begun = begun_reply(messages)
        return prompt_ids(tokenizer, messages), lambda: detokeniser(tokenizer, begun)

    info = told(info, prepared.kernels, spec.cpu_precision)
    return ChatGLMEngine(speaker, ask, info, prepared.model, extras)
