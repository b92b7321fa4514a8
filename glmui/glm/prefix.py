"""P-Tuning v2 (Liu et al., 2021): a trained prefix, keys and values that stand before all tokens in a layer.

A prefix has no tokens and no positions: real tokens keep theirs, every row sees all of it, and its keys are
used as they are, not turned. So it is put into a cache once (cache.py), and the mask opens its columns
(layout.py); nothing else of a model knows about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from glmui.errors import ModelError
from glmui.glm.cache import Prefix
from glmui.glm.checkpoint import PREFIX, is_finite, read_file
from glmui.glm.config import AnyConfig, GLMConfig
from glmui.glm.extra_folders import check_prefix

_LONGEST = 2**16  # entries; published ones have 128

# Shapes at line ends: s entries of the prefix, H hidden size, W numbers that an entry has in all layers.
_TABLE = "embedding.weight"  # s W, or with a projection s H (ChatGLM-6B)
_FIRST = ("trans.0.weight", "trans.0.bias")  # H H (ChatGLM2 and 3: H W), H
_SECOND = ("trans.2.weight", "trans.2.bias")  # W H, W


def read_prefix(folder: Path, config: AnyConfig) -> Prefix:
    """The prefix of a training's output folder, for the model of this config; other weights are passed over.

    Raises ModelError: see extra_folders.check_prefix; and where tensors are missing or do not fit.
    """
    if (found := prefix_of(check_prefix(folder, config), config, folder)) is None:
        raise ModelError("prefix_not_one", folder=folder)
    return found


def prefix_of(files: Iterable[Path], config: AnyConfig, folder: Path) -> Prefix | None:
    """The prefix among the weights of these files, if any. Raises ModelError about `folder`."""
    tensors = prefix_tensors(files)
    if not tensors:
        return None
    _check(tensors, config, folder)
    with torch.no_grad():
        made = encode(tensors)  # s W
    split = made.view(len(made), 2 * config.num_layers, config.kv_heads, config.head_size)
    return Prefix(split.permute(1, 2, 0, 3))


def prefix_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """The prefix encoder's tensors in these files, by the last part of their names."""
    found: dict[str, Tensor] = {}
    for file in files:
        named = read_file(file).items()
        found |= {name.removeprefix(PREFIX): value for name, value in named if name.startswith(PREFIX)}
    return found


def encode(tensors: dict[str, Tensor]) -> Tensor:
    """What the trained tensors stand for, [s, W]: the table, or what two layers with a tanh make of it."""
    table = tensors[_TABLE].float()
    if len(tensors) == 1:
        return table
    weight, bias = (tensors[name].float() for name in _FIRST)
    hidden = torch.tanh(F.linear(table, weight, bias))  # s H
    weight, bias = (tensors[name].float() for name in _SECOND)
    return F.linear(hidden, weight, bias)  # s W


def _check(tensors: dict[str, Tensor], config: AnyConfig, folder: Path) -> None:
    """Raise ModelError where tensors are missing or not as this model's would be."""
    width = 2 * config.num_layers * config.kv_heads * config.head_size
    hidden, projected = config.hidden_size, len(tensors) > 1
    table = hidden if projected and isinstance(config, GLMConfig) else width
    length = len(tensors[_TABLE]) if _TABLE in tensors and tensors[_TABLE].dim() == 2 else 0
    wanted: dict[str, tuple[int, ...]] = {_TABLE: (length, table)}
    if projected:
        wanted |= dict(zip(_FIRST, [(hidden, table), (hidden,)], strict=True))
        wanted |= dict(zip(_SECOND, [(width, hidden), (width,)], strict=True))
    for name, shape in wanted.items():
        found = tensors.get(name)
        if found is None or tuple(found.shape) != shape or not 0 < length <= _LONGEST:
            told = "missing" if found is None else list(found.shape)
            raise ModelError("prefix_shape", folder=folder, name=name, found=told, wanted=list(shape))
        if not found.is_floating_point() or not is_finite(found):
            raise ModelError("model_not_finite", folder=folder, name=PREFIX + name)
