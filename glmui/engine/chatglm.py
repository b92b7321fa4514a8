"""Family chatglm: ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B from their published folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from glmui.engine import cards
from glmui.engine import device as devices
from glmui.engine.decoders import Held, decoder_of
from glmui.engine.extras import ChatGLMEngine, Extras
from glmui.engine.generate import Speaker
from glmui.engine.loaded import LoadedEngine, kernel_folder, told, warm_up
from glmui.engine.placement import Placement, cache_dtype, placement
from glmui.engine.prepare import OnPart, open_prepared
from glmui.glm.checkpoint import AnyModel, load_model
from glmui.glm.config import read_config
from glmui.text.chatglm import begun_reply
from glmui.text.chatglms import Detokeniser, detokeniser, open_tokenizer, prompt_ids, stops
from glmui.types import BITS, EngineInfo, EngineSpec, Message, Progress


def open_chatglm(spec: EngineSpec, on_progress: Callable[[Progress], None]) -> LoadedEngine:
    """Load the model of `spec.folder`, not the extras. Raises ModelError, or InvalidInput for the device."""
    folder = Path(spec.folder)
    config = read_config(folder, spec.chatglm_family)
    tokenizer = open_tokenizer(folder, config.family, config.vocab_size)
    bits = 0 if config.quantization_bit else BITS[spec.quantize]
    where = placement(spec, config)
    threads = spec.threads or devices.count_physical_cores()
    torch.set_num_threads(threads)
    found = _open_cards(where, spec.kernel_dir, on_progress)

    def load(*, on_progress: OnPart, ready: Mapping[str, nn.Module] | None = None) -> AnyModel:
        model = load_model(
            folder, where.place, bits, on_progress=on_progress, family=spec.chatglm_family, ready=ready
        )
        cards.settle(model, found)
        return model

    stored = bits or config.quantization_bit
    hasty = spec.hasty and where.holds_all  # weights that no file keeps are all memory of our own
    prepared = open_prepared(
        load, replace(spec, hasty=hasty), where.device, where.place, stored, threads, on_progress
    )
    model = prepared.model
    model.cache_dtype, model.piece = cache_dtype(spec), where.piece
    extras = Extras(model, folder)  # before the decoder, whose cache a prefix begins
    step = cards.step_of(model, found)
    decoder = decoder_of(model, _held(spec, where), step)
    if where.device != "cpu":
        warm_up(decoder, partial(prompt_ids, tokenizer))
    info = EngineInfo(
        state="ready",
        model=spec.model,
        family="chatglm",
        device=where.device,
        dtype=f"int{stored}" if stored else str(where.dtype).removeprefix("torch."),
        threads=threads,
        context_length=config.context_length,
        context_room=where.room,
        layers=where.layers,
        prefill_piece=where.piece,
        reason=prepared.reason or where.reason,
    )
    speaker = Speaker(
        decoder=decoder,
        stop_ids=stops(config.family) | {config.eos_token_id},
        context_length=max(config.context_length, spec.context),
        room=where.room,
        stop_repetition=spec.stop_repetition,
        on_progress=on_progress,
        ahead=step is not None,
    )

    def ask(messages: Sequence[Message]) -> tuple[list[int], Detokeniser]:
        return prompt_ids(tokenizer, messages), detokeniser(tokenizer, begun_reply(messages))

    info = cards.told(told(info, prepared.kernels, spec.cpu_precision), found, model, step)
    return ChatGLMEngine(speaker, ask, info, extras)


def _open_cards(where: Placement, folder: str, on_progress: Callable[[Progress], None]) -> cards.Cards:
    """The kernels of the cards that the model is to use, whose memory is bounded from here on."""
    if where.plan is None:
        return cards.Cards({})
    # cuDNN's attention, which torch prefers on the newest cards, is planned anew for each length of a prompt.
    torch.backends.cuda.enable_cudnn_sdp(False)
    cards.limit_memory(where.plan)
    return cards.open_cards(where.layers, kernel_folder(folder), on_progress)


def _held(spec: EngineSpec, where: Placement) -> Held:
    """On a card memory is taken for the context that was planned, once; elsewhere when it is needed."""
    planned = min(spec.context, where.room) if where.device not in ("cpu", "mps") else 0
    return Held(planned, where.room)
