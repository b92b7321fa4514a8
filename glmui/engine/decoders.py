"""The models of glm/ as decoders of one sequence, each with what it may keep of its KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from glmui.engine.generate import common_prefix
from glmui.glm.cache import SPARE, KVCache
from glmui.glm.chatglm2 import ChatGLM2Model
from glmui.glm.checkpoint import AnyModel
from glmui.glm.layout import Causal, Layout
from glmui.glm.model import ChatGLMModel


@dataclass(frozen=True, slots=True)
class Held:
    """How many tokens a decoder's cache takes memory for.

    planned: at once and for good, so that a card's memory is the same after every reply; 0 for what is
    needed, when it is. most: what it never grows beyond by itself, 0 for no bound.
    """

    planned: int = 0
    most: int = 0

    def cache(self, model: AnyModel, needed: int = 0, before: int = 0) -> KVCache:
        """An empty cache with room for `needed` tokens and more. before: the capacity of the last one."""
        wished = max(needed + SPARE, before * 5 // 4)
        capacity = max(needed, self.planned, min(wished, self.most or wished))
        cache = model.new_cache(capacity)
        cache.most = self.most
        if self.planned:
            _take(cache, model)
        return cache


def _take(cache: KVCache, model: AnyModel) -> None:
    """Take the cache's memory now, in each layer where that layer is."""
    config = model.config
    for layer, block in enumerate(model.get_submodule(model.BLOCKS).children()):
        like = block.get_submodule("input_layernorm").get_parameter("weight")
        cache.take(layer, like, 1, config.kv_heads, config.head_size)


class Step(Protocol):
    """A faster way to compute one token than the model's own (card_step.CardStep)."""

    def logits(self, token: int, layout: Layout | Causal, cache: KVCache) -> Tensor:
        """[vocab] after `token`, which is put into the cache behind what it holds."""
        ...


class ChatGLMDecoder:
    """ChatGLM-6B and its KV `cache`. A prompt asked again (another try at a reply) is not read again;
    any other is read anew, since each of its keys depends on all of its tokens."""

    def __init__(self, model: ChatGLMModel, held: Held = Held(), step: Step | None = None) -> None:
        self.device = model.device
        self.model = model
        self._held, self._step = held, step
        self.cache = held.cache(model)
        self._prompt: list[int] = []
        self._layout: Layout | None = None
        self._logits = torch.empty(0)

    def prefill(self, ids: list[int], on_piece: Callable[[float], None]) -> Tensor:
        """Logits [vocab] after the prompt `ids`; see generate.Decoder.

        Raises InvalidInput("prompt_without_gap") when `ids` lack [gMASK] or <sop>.
        """
        if ids == self._prompt:
            self.cache.trim(len(ids))
            on_piece(1.0)
            return self._logits
        self._prompt = []
        rows, _ = self.model.pad_left([ids])
        rows = rows.to(self.device)
        self._layout = self.model.layout(rows)
        self._empty_cache(len(ids))
        self._logits = self.model(rows, self._layout, self.cache, on_piece, last_only=True)[0, -1]
        self._prompt = list(ids)
        return self._logits

    def step(self, token: int) -> Tensor:
        """Logits [vocab] after one more id."""
        assert self._layout is not None, "prefill comes first"
        self.cache.make_room(1)
        if self._step is not None:
            return self._step.logits(token, self._layout, self.cache)
        row = torch.tensor([[token]], device=self.device)
        logits: Tensor = self.model(row, self._layout, self.cache, last_only=True)[0, -1]
        return logits

    def renew(self) -> None:
        """Begin anew, since something of the model is not what it was."""
        self._prompt = []
        self._new_cache()

    def _empty_cache(self, length: int) -> None:
        """Make room for a prompt: in the old cache or a larger one."""
        self.cache.trim(0)
        if self.cache.capacity < length:
            self._new_cache(length, self.cache.capacity)

    def _new_cache(self, length: int = 0, before: int = 0) -> None:
        self.cache = self.model.new_cache(0)  # so that the old one's memory is free before more is taken
        self.cache = self._held.cache(self.model, length, before)


class ChatGLM2Decoder:
    """ChatGLM2 or 3 and its KV `cache`, which is kept from prompt to prompt: what a prompt begins with in
    common with all that was read and said before is not computed again."""

    def __init__(self, model: ChatGLM2Model, held: Held = Held(), step: Step | None = None) -> None:
        self.device = model.device
        self.model = model
        self._held, self._step = held, step
        self._ids: list[int] = []  # what the cache holds
        self.cache = held.cache(model)
        self._layout = model.layout(torch.zeros((1, 1), dtype=torch.long, device=self.device))

    def prefill(self, ids: list[int], on_piece: Callable[[float], None]) -> Tensor:
        """Logits [vocab] after the prompt `ids`; see generate.Decoder. Stopped, it keeps what it has read."""
        known = min(common_prefix(self._ids, ids), len(ids) - 1)
        self.cache.trim(known)
        new = ids[known:]
        try:
            return self._read(new, lambda part: on_piece((known + part * len(new)) / len(ids)))
        finally:
            self._ids = ids[: self.cache.length]

    def step(self, token: int) -> Tensor:
        """Logits [vocab] after one more id."""
        self.cache.make_room(1)
        if self._step is not None:
            logits = self._step.logits(token, self._layout, self.cache)
        else:
            logits = self._read([token])
        self._ids.append(token)
        return logits

    def renew(self) -> None:
        """See ChatGLMDecoder."""
        self._ids = []
        self.cache = self.model.new_cache(0)
        self.cache = self._held.cache(self.model)

    def _read(self, ids: list[int], on_piece: Callable[[float], None] | None = None) -> Tensor:
        self.cache.make_room(len(ids))
        row = torch.tensor([ids], device=self.device)
        logits: Tensor = self.model(row, self._layout, self.cache, on_piece, last_only=True)[0, -1]
        return logits


GLMDecoder = ChatGLMDecoder | ChatGLM2Decoder


def decoder_of(model: AnyModel, held: Held = Held(), step: Step | None = None) -> GLMDecoder:
    """A decoder of the model, with an empty cache. step: what computes a reply's tokens, None: the model."""
    if isinstance(model, ChatGLMModel):
        return ChatGLMDecoder(model, held, step)
    return ChatGLM2Decoder(model, held, step)
