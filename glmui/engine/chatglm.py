"""Family chatglm: ChatGLM-6B from its published folder, FP16, INT8 or INT4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glmui.engine import device as devices
from glmui.engine.generate import Speaker
from glmui.engine.loaded import LoadedEngine, told, with_kernels
from glmui.errors import ModelError
from glmui.glm.cache import SPARE, KVCache
from glmui.glm.checkpoint import Place, everything_on, load_model
from glmui.glm.config import GLMConfig
from glmui.glm.layout import Layout, pad_left
from glmui.glm.model import ChatGLMModel
from glmui.text.chatglm import ChatGLMTokenizer, begun_reply, prompt_ids
from glmui.text.chatglm_reply import ChatGLMDetokeniser
from glmui.types import EngineInfo, EngineSpec, Message, Progress

BITS = {"none": 0, "int8": 8, "int4": 4}

# Bytes of a card that "mixed" leaves free: KV cache, activations, and what torch itself takes.
_CARD_RESERVE = 1_200_000_000


class ChatGLMDecoder:
    """The model and its KV cache. A prompt asked again (another try at a reply) is not read again;
    any other is read anew, since each of its keys depends on all of its tokens."""

    def __init__(self, model: ChatGLMModel) -> None:
        self.device = model.transformer.word_embeddings.weight.device
        self.model = model
        self._cache: KVCache | None = None
        self._prompt: list[int] = []
        self._layout: Layout | None = None
        self._logits = torch.empty(0)

    def prefill(self, ids: list[int], on_piece: Callable[[float], None]) -> Tensor:
        """Logits [vocab] after the prompt `ids`; see generate.Decoder.

        Raises InvalidInput("prompt_without_gap") when `ids` lack [gMASK] or <sop>.
        """
        if self._cache is not None and ids == self._prompt:
            self._cache.trim(len(ids))
            on_piece(1.0)
            return self._logits
        self._prompt = []
        rows, _ = pad_left([ids], self.model.config)
        rows = rows.to(self.device)
        self._layout = Layout.of(rows, self.model.config)
        self._cache = self._empty_cache(len(ids))
        self._logits = self.model(rows, self._layout, self._cache, on_piece, last_only=True)[0, -1]
        self._prompt = list(ids)
        return self._logits

    def step(self, token: int) -> Tensor:
        """Logits [vocab] after one more id."""
        assert self._cache is not None, "prefill comes first"
        self._cache.make_room(1)
        row = torch.tensor([[token]], device=self.device)
        logits: Tensor = self.model(row, self._layout, self._cache, last_only=True)[0, -1]
        return logits

    def _empty_cache(self, length: int) -> KVCache:
        """The old cache, emptied, where it has the room; else a new one, the old one's memory freed first."""
        if self._cache is not None and self._cache.capacity >= length:
            self._cache.trim(0)
            return self._cache
        self._cache = None
        return self.model.new_cache(length + SPARE)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model goes. device: as EngineInfo tells it. reason: a key of the locales' "reasons"."""

    place: Place
    device: str
    dtype: torch.dtype
    reason: str


def placement(wish: str, config: GLMConfig, dtype: torch.dtype | None = None, bits: int = 0) -> Placement:
    """Decide device and dtype. bits: what the weights will have in memory, 0 for float16.

    Without a dtype: float32 on a CPU, where it is exact, and float16 on a card, as published.
    Raises InvalidInput("device_missing").
    """
    if wish == "mixed":
        card = torch.device(devices.resolve_device("cuda"))
        free, _ = torch.cuda.mem_get_info(card)
        place = _mixed(card, layers_on_card(config, bits, free), dtype or torch.float16)
        return Placement(place, "mixed", dtype or torch.float16, "reasons.chatglm_mixed")
    device = devices.resolve_device(wish)
    dtype = dtype or (torch.float32 if device == "cpu" else torch.float16)
    reason = "reasons.chatglm_cpu" if device == "cpu" else "reasons.card_float16"
    return Placement(everything_on(device, dtype), device, dtype, reason)


def layers_on_card(config: GLMConfig, bits: int, free: int) -> int:
    """How many blocks fit on a card with `free` bytes, beside the embedding and the reserve."""
    width = config.hidden_size
    block = (4 * width + 2 * config.inner_hidden_size) * width * (bits or 16) // 8
    embedding = config.vocab_size * width * 2
    return max(0, min(config.num_layers, (free - _CARD_RESERVE - embedding) // block))


def _mixed(card: torch.device, layers: int, dtype: torch.dtype) -> Place:
    """The first blocks, the embedding (which is the output head) and the last norm on the card, the others
    on the CPU in float32."""
    on_cpu = (torch.device("cpu"), torch.float32)

    def place(name: str) -> tuple[torch.device, torch.dtype]:
        _, _, rest = name.partition("transformer.layers.")
        return on_cpu if rest and int(rest.partition(".")[0]) >= layers else (card, dtype)

    return place


def device_map(model: ChatGLMModel) -> Mapping[str, str]:
    """The device of the embedding, each block, the last norm and the output head."""
    body = model.transformer
    parts = {
        "transformer.word_embeddings": body.word_embeddings,
        **{f"transformer.layers.{n}": block for n, block in enumerate(body.layers)},
        "transformer.final_layernorm": body.final_layernorm,
        "lm_head": model.lm_head,
    }
    return {name: str(next(part.parameters()).device) for name, part in parts.items()}


def open_chatglm(spec: EngineSpec, on_progress: Callable[[Progress], None]) -> LoadedEngine:
    """Load the model of `spec.folder`. Raises ModelError, or InvalidInput for the device."""
    folder = Path(spec.folder)
    config = GLMConfig.from_folder(folder)
    tokenizer = open_tokenizer(folder, config)
    bits = 0 if config.quantization_bit else BITS[spec.quantize]
    where = placement(spec.device, config, bits=bits or config.quantization_bit)
    threads = spec.threads or devices.count_physical_cores()
    torch.set_num_threads(threads)
    model = load_model(
        folder, where.place, bits, on_progress=lambda part: on_progress(Progress("loading", part))
    )
    stored = bits or config.quantization_bit
    kernels = None
    if stored:
        kernels = with_kernels(model, where.device, threads, spec.cpu_precision, spec.head_bits)
    info = EngineInfo(
        state="ready",
        model=spec.model,
        family="chatglm",
        device=where.device,
        dtype=f"int{stored}" if stored else str(where.dtype).removeprefix("torch."),
        threads=threads,
        context_length=config.max_sequence_length,
        reason=where.reason,
    )
    speaker = Speaker(
        decoder=ChatGLMDecoder(model),
        detokeniser=lambda: ChatGLMDetokeniser(tokenizer),
        stop_ids={config.eos_token_id},
        stop_repetition=spec.stop_repetition,
        on_progress=on_progress,
    )

    def ask(messages: Sequence[Message]) -> tuple[list[int], Callable[[], ChatGLMDetokeniser]]:
        begun = begun_reply(messages)
        return prompt_ids(tokenizer, messages), lambda: ChatGLMDetokeniser(tokenizer, begun)

    return LoadedEngine(speaker, ask, told(info, kernels, spec.cpu_precision))


def open_tokenizer(folder: Path, config: GLMConfig) -> ChatGLMTokenizer:
    """The folder's tokenizer. Raises ModelError, also when it has more pieces than the model has ids."""
    tokenizer = ChatGLMTokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise ModelError("model_wrong_vocabulary", file=tokenizer.file)
    return tokenizer
