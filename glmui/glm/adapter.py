"""LoRA (Hu et al., 2021): what training added to a layer's weight, W + scale B A, as two small matrices.

They stay beside the layer, whatever keeps its weight (torch, a quantised layer, a kernel): what they compute
is added to what it computes. So the base is never changed, and adapters come and go without loading it
again. Only where a float base is quantised while it is loaded can they go into the weight before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glmui.errors import ModelError
from glmui.glm.chatglm2 import ChatGLM2Model
from glmui.glm.checkpoint import AnyModel, assign, is_finite, read_file
from glmui.glm.extra_folders import MODELS, check_adapter
from glmui.glm.model import ChatGLMModel

PARTS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # of a block, that may have one
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight")  # PEFT's


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """pairs: by the layer's name A [r, in] and B [out, r], float32, B times the scale."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]


def read_adapter(folder: Path, model: AnyModel) -> Adapter:
    """The adapter of a PEFT folder, for this model (empty_model's will do).

    Raises ModelError: see extra_folders.check_adapter; and for tensors of other layers, other models,
    other shapes, or that are not LoRA's.
    """
    lora = check_adapter(folder, model.config)
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_file(lora.file).items():
        layer, half = _place(name, model, folder)
        halves.setdefault(layer, {})[half] = tensor.float()
    if not halves:
        raise ModelError("adapter_not_one", folder=folder, file=lora.file.name)
    pairs = {layer: _pair(layer, found, lora.rank, model, folder) for layer, found in halves.items()}
    return Adapter({layer: (a, b * lora.scale) for layer, (a, b) in pairs.items()})


def _place(name: str, model: AnyModel, folder: Path) -> tuple[str, str]:
    """Which layer of the model, and which half of its pair, a tensor is. Raises ModelError."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ModelError("adapter_tensor", folder=folder, name=name)
    layer, half = match.groups()
    other = ChatGLM2Model if isinstance(model, ChatGLMModel) else ChatGLMModel
    if layer.startswith(f"{other.BLOCKS}."):
        raise ModelError("adapter_other_model", folder=folder, model=MODELS[model.config.family])
    if not layer.startswith(f"{model.BLOCKS}.") or layer.rpartition(".")[2] not in PARTS:
        raise ModelError("adapter_tensor", folder=folder, name=name)
    return layer, half


def _pair(
    layer: str, halves: dict[str, Tensor], rank: int, model: AnyModel, folder: Path
) -> tuple[Tensor, Tensor]:
    """A and B of one layer. Raises ModelError where they are not both there, or do not fit it."""
    try:
        base = model.get_submodule(layer)
    except AttributeError as error:
        layers = model.config.num_layers
        raise ModelError("adapter_other_layers", folder=folder, name=layer, layers=layers) from error
    a, b = halves.get("A", torch.empty(0)), halves.get("B", torch.empty(0))
    wanted = [rank, base.in_features], [base.out_features, rank]
    if ([*a.shape], [*b.shape]) != wanted:
        raise ModelError("adapter_shape", folder=folder, name=layer, found=[*a.shape, *b.shape])
    if not (is_finite(a) and is_finite(b)):
        raise ModelError("model_not_finite", folder=folder, name=layer)
    return a, b


def attach(model: AnyModel, adapter: Adapter) -> list[RemovableHandle]:
    """Let the model answer with an adapter, until all handles are removed. Each pair goes to where its layer
    computes, in that dtype: all of them first, for a card may have no room for the last, and a part of an
    adapter must never answer."""
    hooks = {
        model.get_submodule(layer): partial(_add, a.to(like := _norm_of(model, layer)), b.to(like))
        for layer, (a, b) in adapter.pairs.items()
    }
    return [layer.register_forward_hook(hook) for layer, hook in hooks.items()]


def _add(a: Tensor, b: Tensor, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + F.linear(F.linear(inputs[0], a), b)


def _norm_of(model: AnyModel, layer: str) -> Tensor:
    """A weight of the block that a layer is in, which tells where and in what it computes."""
    block = ".".join(layer.split(".")[: model.BLOCKS.count(".") + 2])
    return model.get_parameter(f"{block}.input_layernorm.weight")


def merge(adapter: Adapter, name: str, part: nn.Module) -> None:
    """Add the adapter to the weights of the model's part of that name: in float32, rounded to their dtype."""
    for layer, (a, b) in adapter.pairs.items():
        if layer.startswith(f"{name}."):
            inside = f"{layer.removeprefix(f'{name}.')}.weight"
            weight = part.get_parameter(inside)
            assign(part, inside, torch.addmm(weight.float(), b, a).to(weight.dtype))
