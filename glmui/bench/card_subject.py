"""A ChatGLM on a card as the bench drives it, and what there is to measure on a card besides."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmui.bench.figures import (
    MOST_STEPS,
    PUBLISHED,
    NotMeasured,
    Published,
    Rows,
    decode_rate,
    median_of,
    prefill_rate,
)
from glmui.bench.subjects import (
    CausalSubject,
    DecoderRow,
    GLMRows,
    GLMSubject,
    bytes_of,
    kept_bytes,
    tensors_of,
)
from glmui.glm.checkpoint import AnyModel
from glmui.memory.visible import visible
from glmui.meter import Meter
from glmui.quant.linear import QuantizedLinear
from glmui.quant.on_card import CardLinear
from glmui.quant.packing import dequantize_weight

_PREFILL_SECONDS = 20.0
# Bytes: more than any card's L2 cache, and little beside a model; on a card that is full all the same, less.
_COPIED = (128 << 20, 32 << 20)


class Peaks:
    """The memory of all cards together, as torch's allocator counts it. See figures.OnCard.

    To be mixed into a figures.Subject.
    """

    def peak(self: Any, context: int) -> int:
        reset_peaks()
        row = self.at(context - MOST_STEPS, 1)
        row.reset()
        for _ in range(MOST_STEPS):
            row.step()
        return vram_peak()

    def prefill_peak(self: Any, tokens: int) -> int:
        reset_peaks()
        self.prefill(tokens)
        weights, cache = self.vram_kept()
        return vram_peak() - int(weights) - int(cache)

    def vram_kept(self) -> tuple[int, int]:
        """Bytes of the weights on cards, and of the KV cache there with all the room it has taken."""
        raise NotImplementedError


def reset_peaks() -> None:
    for card in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(card)


def vram_peak() -> int:
    return sum(torch.cuda.max_memory_allocated(card) for card in range(torch.cuda.device_count()))


def on_cards(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of those that are on cards, each counted once."""
    return bytes_of(*{id(t): t for t in tensors if t is not None and t.is_cuda}.values())


class CausalCardSubject(Peaks, CausalSubject):
    """A transformers model on a card."""

    def vram_kept(self) -> tuple[int, int]:
        layers = self._decoder.cache.layers
        cache = (t for layer in layers for t in (layer.keys, layer.values))
        return on_cards(self._decoder.model.parameters()), on_cards(cache)


class CardSubject(Peaks, GLMSubject):
    """See figures.Subject, figures.OnCard and figures.WithPublished.

    By the engine's own decoder: it alone takes the quickest way to the next token, and there may be no memory
    for a second KV cache.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__(decoder)
        self._decoder = decoder

    @torch.inference_mode()
    def prefill(self, tokens: int) -> None:
        int(self._decoder.prefill(self._prompt(tokens), lambda part: None).argmax())

    def at(self, context: int, rows: int) -> Rows:
        if rows == 1:
            return CardRow(self._decoder, self._prompt(context))
        several: Rows = self._in_room(GLMRows, self._model, self._prompt(context), rows)
        return several

    def vram_kept(self) -> tuple[int, int]:
        """See Peaks."""
        rooms = (self._decoder.cache.room(layer) for layer in range(self._model.config.num_layers))
        return on_cards(self._model.parameters()), on_cards(t for room in rooms for t in tensors_of(room))

    def published(self, what: Published) -> float:
        """See WithPublished."""
        tokens = PUBLISHED[what]
        with published_way(self._model):
            if what == "decode":
                rate: float = self._in_room(
                    lambda: decode_rate(GLMRows(self._model, self._prompt(tokens), 1))
                )
                return rate
            return median_of(lambda: self._in_room(prefill_rate, self, tokens), _PREFILL_SECONDS)

    def _in_room(self, take: Any, *arguments: Any) -> Any:
        try:
            return take(*arguments)
        except torch.OutOfMemoryError:
            raise NotMeasured("card_memory") from None


class CardRow(DecoderRow):
    """One conversation in the engine's own KV cache."""

    def __init__(self, decoder: Any, prompt: list[int]) -> None:
        super().__init__(decoder, prompt)
        self._model, self._glm = decoder.model, decoder

    def cache_bytes(self) -> int:
        self.reset()
        return kept_bytes(self._glm.cache, self._model.config.num_layers, len(self._prompt))


class PublishedLinear(nn.Module):
    """As the published code does it: the whole matrix in 16 bits for each multiplication."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self._layer = layer
        self.bias = layer.bias  # by which a block knows what it computes in

    def forward(self, x: Tensor) -> Tensor:
        layer = self._layer
        if isinstance(layer, CardLinear):
            matrix = x.new_empty(layer.out_features, layer.in_features)
            layer.kernels.widen(layer.weight, layer.weight_scale, layer.weight_bit_width, matrix)
        else:
            kept = layer.weight, layer.weight_scale, layer.weight_bit_width
            matrix = dequantize_weight(*kept, layer.in_features, x.dtype)
        return F.linear(x, matrix, layer.bias)


@contextmanager
def published_way(model: AnyModel) -> Iterator[None]:
    """Within it, the model's quantised layers compute as the published code does."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, PublishedLinear(layer))
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def copy_gb_s(device: str, copies: int = 5) -> float:
    """How fast the card copies memory, bytes read and written counted, the best of several copies: what no
    decoding can be faster than. Raises NotMeasured where there is no memory for it."""
    source, target = _to_copy(device)
    seconds = []
    for _ in range(copies + 1):  # the first wakes the card up
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(8):
            target.copy_(source)
        torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - began) / 8)
    return 2 * source.numel() / min(seconds[1:]) / 1e9


def _to_copy(device: str) -> tuple[Tensor, Tensor]:
    for size in _COPIED:
        try:
            source = torch.empty(size, dtype=torch.uint8, device=device)
            return source, torch.empty_like(source)
        except torch.OutOfMemoryError:
            continue
    raise NotMeasured("card_memory")


def cuda_context(device: str) -> int | None:
    """Bytes of the card that this process holds beside torch's, None where the driver does not tell."""
    with closing(Meter()) as meter:
        card = visible(meter.read(os.getpid()).cards).get(f"cuda:{torch.device(device).index or 0}")
    own = card.own if card else None
    return None if own is None else max(0, own - torch.cuda.memory_reserved(device))
