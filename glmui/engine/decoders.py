"""The models of glm/ as decoders of one sequence, each with what it may keep of its KV cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glmui.engine.generate import Decoder, common_prefix
from glmui.glm.cache import SPARE, KVCache
from glmui.glm.chatglm2 import ChatGLM2Model
from glmui.glm.checkpoint import AnyModel
from glmui.glm.layout import Layout
from glmui.glm.model import ChatGLMModel


class ChatGLMDecoder:
    """ChatGLM-6B and its KV cache. A prompt asked again (another try at a reply) is not read again;
    any other is read anew, since each of its keys depends on all of its tokens."""

    def __init__(self, model: ChatGLMModel) -> None:
        self.device = model.device
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
        rows, _ = self.model.pad_left([ids])
        rows = rows.to(self.device)
        self._layout = self.model.layout(rows)
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


class ChatGLM2Decoder:
    """ChatGLM2 or 3 and its KV cache, which is kept from prompt to prompt: what a prompt begins with in
    common with all that was read and said before is not computed again."""

    def __init__(self, model: ChatGLM2Model) -> None:
        self.device = model.device
        self.model = model
        self._ids: list[int] = []  # what the cache holds
        self._cache = model.new_cache(SPARE)
        self._layout = model.layout(torch.zeros((1, 1), dtype=torch.long, device=self.device))

    def prefill(self, ids: list[int], on_piece: Callable[[float], None]) -> Tensor:
        """Logits [vocab] after the prompt `ids`; see generate.Decoder. Stopped, it keeps what it has read."""
        known = min(common_prefix(self._ids, ids), len(ids) - 1)
        self._cache.trim(known)
        new = ids[known:]
        try:
            return self._read(new, lambda part: on_piece((known + part * len(new)) / len(ids)))
        finally:
            self._ids = ids[: self._cache.length]

    def step(self, token: int) -> Tensor:
        """Logits [vocab] after one more id."""
        logits = self._read([token])
        self._ids.append(token)
        return logits

    def _read(self, ids: list[int], on_piece: Callable[[float], None] | None = None) -> Tensor:
        self._cache.make_room(len(ids))
        row = torch.tensor([ids], device=self.device)
        logits: Tensor = self.model(row, self._layout, self._cache, on_piece, last_only=True)[0, -1]
        return logits


def decoder_of(model: AnyModel) -> Decoder:
    """A decoder of the model, with an empty cache."""
    return ChatGLMDecoder(model) if isinstance(model, ChatGLMModel) else ChatGLM2Decoder(model)
