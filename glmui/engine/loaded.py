"""A loaded model of any family as a ChatEngine, and the C kernels such a model may compute with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from glmui.engine.generate import Decoder, Detokeniser, Speaker, stream_reply
from glmui.engine.request import Cancellations
from glmui.memory.trouble import out_of_memory_on
from glmui.quant.fast import use_kernels
from glmui.quant.kernels.cpu import Loaded, Numerics
from glmui.quant.kernels.cpu import load as load_kernels
from glmui.types import Chunk, EngineInfo, GenerationParams, Message

# A conversation as the model's ids, and a detokeniser for the reply to it.
Ask = Callable[[Sequence[Message]], tuple[list[int], Detokeniser]]


_log = logging.getLogger(__name__)

WARM_UP = [Message("user", "你好，" * 16)]  # more ids than the kernels for few rows take at once


class LoadedEngine:
    """See types.ChatEngine. A last message of the assistant's is continued."""

    def __init__(self, speaker: Speaker, ask: Ask, info: EngineInfo) -> None:
        self.speaker: Speaker | None = speaker
        self._ask = ask
        self._info = info
        self._cancelled = Cancellations()

    def info(self) -> EngineInfo:
        return self._info

    def stream_chat(
        self, messages: Sequence[Message], params: GenerationParams, request_id: str
    ) -> Iterator[Chunk]:
        """See types.ChatEngine."""
        if self.speaker is None:
            raise RuntimeError("the model was unloaded; open it again")
        ids, detokeniser = self._ask(messages)
        yield from stream_reply(self.speaker, ids, detokeniser, params, lambda: request_id in self._cancelled)

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)

    def unload(self) -> None:
        """Let go of the model. In the engine process, ending the process is what frees everything."""
        self.speaker = None
        self._info = replace(self._info, state="asleep")


@torch.inference_mode()
def warm_up(decoder: Decoder, ask: Callable[[Sequence[Message]], list[int]]) -> None:
    """Read a prompt and write two tokens, so that whatever a card's libraries do at their first use (open,
    choose, take memory, record) is done before somebody waits for an answer. A CPU gains nothing by it.

    ask: what makes a conversation ids. Raises what tells that memory ran out; what else goes wrong is left
    to the first answer, which may be asked in a way that the model takes.
    """
    try:
        logits = decoder.prefill(ask(WARM_UP), lambda part: None)
        for _ in range(2):
            logits = decoder.step(int(logits.argmax()))
    except Exception as error:
        if out_of_memory_on(error, str(decoder.device)):
            raise
        _log.warning("no warm-up: %s", error)


def with_kernels(
    model: nn.Module, device: str, threads: int, numerics: Numerics, head_bits: int = 16
) -> Loaded | None:
    """Let the C kernels compute the quantised layers that are on the CPU; None where that is no question."""
    loaded = kernels_for(device, threads)
    if loaded and loaded.kernels:
        use_kernels(model, loaded.kernels, numerics, head_bits)
    return loaded


def kernels_for(device: str, threads: int, folder: str = "") -> Loaded | None:
    """The machine's C kernels; None where the CPU has no part in computing. folder: see kernel_folder."""
    return load_kernels(kernel_folder(folder), threads) if device in ("cpu", "mixed") else None


def told(info: EngineInfo, kernels: Loaded | None, numerics: Numerics) -> EngineInfo:
    """The info with what became of the kernels."""
    if kernels is None:
        return info
    if kernels.kernels is None:
        return replace(info, reason=kernels.reason)
    return replace(info, kernel=kernels.name, cpu_precision=numerics)


def kernel_folder(given: str = "") -> Path:
    """Where built kernels are kept: the given folder, or the one that this account has for such things."""
    if given:
        return Path(given)
    import platformdirs  # lazily, for benchmarks/card.py runs where it is not installed

    return Path(platformdirs.user_cache_dir("glmui", appauthor=False)) / "kernels"
