"""quantize(model): swap a model's linear layers for quantised ones, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from glmui.errors import InvalidInput
from glmui.quant.linear import QuantizedEmbedding, QuantizedLinear

M = TypeVar("M", bound=nn.Module)

HEADS = ("lm_head", "output_layer")  # what ChatGLM-6B, and what ChatGLM2 and 3 call their output head


def quantize(
    model: M,
    weight_bit_width: int = 4,
    use_quantization_cache: bool = False,
    quantization_embeddings: bool = False,
    group_size: int | None = None,
    wide: bool = True,
) -> M:
    """Quantise every nn.Linear of any torch model, one after the other, and return the model.

    weight_bit_width: 4 or 8. use_quantization_cache: on a card, memory for the whole largest matrix, so that
    each is widened in one go to multiply a prompt; else matrices are widened part by part (at most 64 MiB),
    which is nearly as fast. It means nothing on a CPU. quantization_embeddings: also the word embeddings and
    the output head, which are left alone otherwise. group_size: columns that share a scale; None is one scale
    per row, as published, and must be left None for a checkpoint others can read. wide: False rounds as
    ChatGLM2 and 3 do; see packing.quantize_weight. Layers that are quantised already keep their weights. A
    model that has a method layers_changed (as ours for transformers have) is told by it.
    Raises InvalidInput for other bit widths, or a group size that does not divide a layer's width.
    """
    if weight_bit_width not in (4, 8):
        raise InvalidInput("bits_unknown", bits=weight_bit_width)
    embeddings, heads = _embeddings(model), _heads(model)
    wanted = [m for m in model.modules() if type(m) is nn.Linear and m not in heads]
    if quantization_embeddings:
        _quantize_embeddings(model, embeddings, heads, weight_bit_width, group_size)
    places = _places(model)
    while wanted:
        linear = wanted.pop(0)  # the list must not keep a replaced layer's weight alive
        _replace(places.pop(linear), QuantizedLinear.of(linear, weight_bit_width, group_size, wide))
    if use_quantization_cache:
        widen_whole(model)
    if tell := getattr(model, "layers_changed", None):
        tell()
    return model


def widen_whole(model: nn.Module) -> None:
    """Have a card widen each quantised matrix in one go. Not an output head's: it is the largest by far, and
    meets one row of a prompt."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear) and not _is_head(name):
            layer.whole = True


def _embeddings(model: nn.Module) -> list[nn.Embedding]:
    """The word embeddings: those a transformers model names, else all there are."""
    named = _named(model, "get_input_embeddings")
    if named is not None:
        return [named] if isinstance(named, nn.Embedding) else []
    return [m for m in model.modules() if isinstance(m, nn.Embedding)]


def _heads(model: nn.Module) -> list[nn.Module]:
    """Output heads: the one a transformers model names, those tied to an embedding, and those called so."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    named = _named(model, "get_output_embeddings")
    return [
        m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and (m is named or id(m.weight) in tables or _is_head(name))
    ]


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] in HEADS


def _named(model: nn.Module, question: str) -> nn.Module | None:
    ask: Callable[[], nn.Module | None] | None = getattr(model, question, None)
    return ask() if ask else None


def _quantize_embeddings(
    model: nn.Module,
    embeddings: list[nn.Embedding],
    heads: list[nn.Module],
    bits: int,
    group_size: int | None,
) -> None:
    places = _places(model)
    for embedding in embeddings:
        quantised = QuantizedEmbedding.of(embedding, bits, group_size)
        for head in [h for h in heads if h.weight is embedding.weight]:
            _replace(places[head], quantised.head())
            heads.remove(head)
        _replace(places[embedding], quantised)
    for head in heads:
        if isinstance(head, nn.Linear):
            _replace(places[head], QuantizedLinear.of(head, bits, group_size))


def _places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Where each module hangs: (parent, attribute), more than once where it is shared."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():  # named_children() tells a shared one only once
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    return places


def _replace(places: list[tuple[nn.Module, str]], module: nn.Module) -> None:
    for parent, name in places:
        setattr(parent, name, module)
