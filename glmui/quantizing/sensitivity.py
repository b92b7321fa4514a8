"""Which linear layers deserve more bits: measured block by block, then chosen under a size budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glmui.errors import InvalidInput
from glmui.quantizing.compare import Sample, longest, run
from glmui.quantizing.folder import LINEARS, Source, folder_bytes, forms_of
from glmui.quantizing.streamed import Weights, blocks_of, cache_for, quantised, stream
from glmui.quantizing.tensor_header import bytes_of

WIDTHS = (4, 8, 16)
EVERY = 6  # of the built-in texts: one Chinese and one English are enough to rank layers by

Errors = Mapping[str, Mapping[int, float]]  # by linear layer and bits


@dataclass(frozen=True, slots=True)
class Choice:
    """A linear layer in the result. size: bytes. error: of its block's output, by this layer alone."""

    name: str
    bits: int
    size: int
    error: float


def measure(
    folder: Path,
    samples: Sequence[Sample],
    group_size: int | None = None,
    device: str = "cpu",
    on_part: Callable[[float], None] = lambda part: None,
) -> dict[str, dict[int, float]]:
    """How much quantising one linear layer changes what its block hands on, for each layer and width.

    The error is sqrt(mean over tokens of |changed - whole|² / |whole|²), with the source's input to a block.
    So it counts what softmax, GELU and the residual make of a layer's rounding. 16 bits have no error. One
    pass over the folder in the memory of one block.
    """
    weights = Weights(folder)
    model = stream(weights, device, on_part)
    lengths = [len(sample.ids) for sample in samples]
    count = longest(samples)
    real = torch.arange(count) >= count - torch.tensor(lengths)[:, None]  # [samples, count], padding False
    errors: dict[str, dict[int, float]] = {}
    for block, prefix in blocks_of(model).items():

        def look(block: nn.Module, args: tuple[Any, ...], whole: Tensor, prefix: str = prefix) -> None:
            for name, linear in _linears(block):
                errors[f"{prefix}.{name}"] = {16: 0.0}
                for bits in (4, 8):
                    rounded = quantised(linear.weight.detach().cpu(), bits, group_size, weights.wide)
                    changed = _with_weight(block, linear, rounded, args)
                    errors[f"{prefix}.{name}"][bits] = _distance(changed, whole, real)

        block.register_forward_hook(look, prepend=True)  # before the block forgets its weights
    run(model, samples, cache_for(model, count))
    return errors


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEARS:
            yield name, module


def _with_weight(block: nn.Module, linear: nn.Linear, weight: Tensor, args: tuple[Any, ...]) -> Tensor:
    """The block's output with another weight in one of its layers."""
    whole = linear.weight
    linear.weight = nn.Parameter(weight.to(whole.device), requires_grad=False)
    try:
        out: Tensor = block.forward(*args)
    finally:
        linear.weight = whole
    return out


def _distance(changed: Tensor, whole: Tensor, real: Tensor) -> float:
    """The error between two outputs [samples, n, H] over the real tokens."""
    keep = real.to(whole.device)
    off = (changed - whole)[keep].square().sum(-1) / whole[keep].square().sum(-1).clamp_min(1e-30)
    return math.sqrt(float(off.mean()))


def choose(
    source: Source,
    errors: Errors,
    target_bytes: int,
    group_size: int | None = None,
    embedding: Mapping[str, int] | None = None,
) -> list[Choice]:
    """Bits for each linear layer so that the whole folder takes at most `target_bytes`.

    All start with 4 bits; then, again and again, the layer gets more whose squared error falls most for each
    byte, among those that still fit: errors of different layers add up as squares, nearly, for roundings have
    nothing to do with each other. embedding: its bits, where it is quantised.
    Raises InvalidInput("target_gb_too_small") with the smallest possible size.
    """
    bits = dict.fromkeys(source.linears, WIDTHS[0])
    sizes = {width: _sizes(source, width, group_size) for width in WIDTHS}
    left = target_bytes - smallest_bytes(source, group_size, embedding)
    if left < 0:
        raise too_small(source, group_size, embedding)
    while gains := [g for name in bits for g in _gains(name, bits[name], sizes, errors[name], left)]:
        _, name, width, more = max(gains)
        bits[name] = width
        left -= more
    return [Choice(name, width, sizes[width][name], errors[name][width]) for name, width in bits.items()]


def smallest_bytes(source: Source, group_size: int | None, embedding: Mapping[str, int] | None = None) -> int:
    """The folder's size with 4 bits everywhere, and what naming each layer's bits takes at most."""
    naming = sum(len(name) + 20 for name in source.linears)
    return folder_bytes(source, {**source.uniform(WIDTHS[0]), **(embedding or {})}, group_size) + naming


def too_small(source: Source, group_size: int | None, embedding: Mapping[str, int] | None) -> InvalidInput:
    size = math.ceil(smallest_bytes(source, group_size, embedding) / 1e6) / 1e3
    return InvalidInput("target_gb_too_small", smallest=f"{size:.3f}")


def _gains(
    name: str, now: int, sizes: Mapping[int, Mapping[str, int]], error: Mapping[int, float], left: int
) -> Iterator[tuple[float, str, int, int]]:
    """What each wider form of a layer brings: squared error less for each byte, name, bits, bytes more."""
    for width in WIDTHS:
        more = sizes[width][name] - sizes[now][name]
        if width > now and more <= left:
            yield (error[now] ** 2 - error[width] ** 2) / more, name, width, more


def _sizes(source: Source, width: int, group_size: int | None) -> dict[str, int]:
    """Bytes of each linear layer's weight and scale in this width."""
    forms = forms_of(source, dict.fromkeys(source.linears, width), group_size)
    names = {name: (f"{name}.weight", f"{name}.weight_scale") for name in source.linears}
    return {name: sum(bytes_of(forms[n]) for n in both if n in forms) for name, both in names.items()}
