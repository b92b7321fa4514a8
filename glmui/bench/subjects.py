"""The loaded models as the bench drives them: prompts of any length, and decoding from a given context."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glmui.bench.figures import MOST_STEPS, NotMeasured, Rows
from glmui.engine.decoders import decoder_of
from glmui.engine.generate import Decoder
from glmui.glm.cache import KVCache, Room
from glmui.glm.checkpoint import AnyModel
from glmui.glm.config import GLMConfig
from glmui.quant.fast import KernelLinear
from glmui.text.chatglm2 import GMASK, SOP

if TYPE_CHECKING:
    from glmui.engine.causal_lm import CausalDecoder


class GLMSubject:
    """A ChatGLM of any of the three. Where only decoding is measured, random keys stand in for a prompt."""

    reads_context = False

    def __init__(self, decoder: Any) -> None:
        self._model: AnyModel = decoder.model
        self._random = random.Random(0)
        read = [p for p in self._model.parameters() if p is not embedding_unread(self._model)]
        self.weight_bytes = bytes_of(*read, *packed_weights(self._model))

    @torch.inference_mode()
    def prefill(self, tokens: int) -> None:
        """By a fresh decoder, so that no cache outlives its figure."""
        int(decoder_of(self._model).prefill(self._prompt(tokens), lambda part: None).argmax())

    def at(self, context: int, rows: int) -> Rows:
        return GLMRows(self._model, self._prompt(context), rows)

    def _prompt(self, tokens: int) -> list[int]:
        config = self._model.config
        words = self._random.choices(range(300, config.vocab_size // 2), k=tokens - 2)
        if isinstance(config, GLMConfig):
            return [*words, config.gmask_token_id, config.bos_token_id]
        return [GMASK, SOP, *words]


class GLMRows:
    def __init__(self, model: AnyModel, prompt: list[int], rows: int) -> None:
        self._model, self._context = model, len(prompt)
        ids = torch.tensor([prompt] * rows, device=model.device)
        self._layout = model.layout(ids)
        self._cache = model.new_cache(len(prompt) + MOST_STEPS)
        with torch.inference_mode():
            self._fill(rows)
        self._newest = ids[:, -1:]  # [rows, 1]

    def _fill(self, rows: int) -> None:
        config, blocks = self._model.config, self._model.get_submodule(self._model.BLOCKS)
        values = torch.randn(rows, self._context, config.kv_heads, config.head_size)
        for place, block in enumerate(blocks.children()):
            there = values.to(block.get_submodule("input_layernorm").get_parameter("weight"))
            self._cache.write(place, 0, there, there)
        self._cache.length = self._context

    def reset(self) -> None:
        self._cache.trim(self._context)

    @torch.inference_mode()
    def step(self) -> None:
        logits = self._model(self._newest, self._layout, self._cache, last_only=True)  # [rows, 1, vocab]
        self._newest = logits.argmax(-1)
        self._newest.tolist()

    def cache_bytes(self) -> int:
        return kept_bytes(self._cache, self._model.config.num_layers, self._context)


class DecoderRow:
    """One sequence in a decoder of its engine, whose prompt was really read."""

    def __init__(self, decoder: Decoder, prompt: list[int]) -> None:
        self._decoder, self._prompt = decoder, prompt
        self._newest = 0

    @torch.inference_mode()
    def reset(self) -> None:
        """Quick after the first time: no decoder reads a prompt again that it has in its cache."""
        self._newest = int(self._decoder.prefill(self._prompt, lambda part: None).argmax())

    @torch.inference_mode()
    def step(self) -> None:
        self._newest = int(self._decoder.step(self._newest).argmax())


class CausalSubject:
    """A transformers model: one row at a time, and its cache comes from a real prompt."""

    reads_context = True

    def __init__(self, decoder: CausalDecoder) -> None:
        self._decoder, model = decoder, decoder.model
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._random = random.Random(0)
        self.weight_bytes = weights_read(model)

    @torch.inference_mode()
    def prefill(self, tokens: int) -> None:
        self._decoder.renew()
        int(self._decoder.prefill(self._prompt(tokens), lambda part: None).argmax())

    def at(self, context: int, rows: int) -> Rows:
        if rows > 1:
            raise NotMeasured("no_batch")
        return CausalRow(self._decoder, self._prompt(context))

    def _prompt(self, tokens: int) -> list[int]:
        return self._random.choices(range(self._vocabulary), k=tokens)


class CausalRow(DecoderRow):
    def __init__(self, decoder: CausalDecoder, prompt: list[int]) -> None:
        super().__init__(decoder, prompt)
        self._causal = decoder

    def cache_bytes(self) -> int:
        self.reset()
        return sum(bytes_of(layer.keys, layer.values) for layer in self._causal.cache.layers)


def packed_weights(model: nn.Module) -> Iterator[Tensor]:
    """The weights that kernels keep in an order of their own, which are no parameters."""
    for module in model.modules():
        if isinstance(module, KernelLinear):
            yield from (module.packed.weight, module.packed.scale)


def embedding_unread(model: AnyModel) -> Tensor | None:
    """The embedding's table where the output head has one of its own."""
    table: Tensor = model.get_submodule(model.EMBEDDING).get_parameter("weight")
    head = model.get_submodule(model.HEAD)
    return None if getattr(head, "weight", None) is table else table


def weights_read(model: Any) -> int:
    """Bytes of every weight, but of the word embeddings only where they are the output head too."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    unread = set() if head is None or head.weight is embeddings.weight else set(embeddings.parameters())
    return bytes_of(*(weight for weight in model.parameters() if weight not in unread))


def kept_bytes(cache: KVCache, layers: int, tokens: int) -> int:
    """Bytes of so many tokens in a KV cache, as they are kept."""
    rooms = [cache.room(layer) for layer in range(layers)]
    kept = [tensor for room in rooms for tensor in tensors_of(room)]
    return sum(bytes_of(tensor[:, :, : cache.front + tokens]) for tensor in kept)


def tensors_of(room: Room) -> list[Tensor]:
    """What a layer's part of a KV cache is made of."""
    kept = room.keys, room.values, room.key_scale, room.value_scale
    return [tensor for tensor in kept if tensor is not None]


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
