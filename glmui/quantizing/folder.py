"""From a float16 ChatGLM folder to a quantised one: the published names, bytes and config keys.

It goes tensor by tensor: the source's files are mapped and let go again, so that a model of any size takes
the memory of a few of its tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from glmui.errors import InvalidInput, ModelError
from glmui.glm.checkpoint import (
    AnyModel,
    check_layout,
    empty_model,
    is_finite,
    published_name,
    read_file,
)
from glmui.glm.files import check_folder, weight_files
from glmui.glm.model import ChatGLMModel
from glmui.quant.linear import check_group_size
from glmui.quant.mapped import release
from glmui.quant.packing import quantize_weight
from glmui.quantizing.new_folder import new_folder
from glmui.quantizing.tensor_file import TensorFile
from glmui.quantizing.tensor_header import Form, file_bytes
from glmui.text.model_files import read_config
from glmui.types import Progress

LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # of each block, as published

# What a folder is taken for whose files fit both ChatGLM2 and 3: their networks and layouts are the same.
EITHER = "chatglm3"

# What a folder needs besides its weights and config.json. Code is left out: nothing here ever runs it.
_BESIDES = (
    "ice_text.model",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "LICENSE",
    "MODEL_LICENSE",
)

OnProgress = Callable[[Progress], None]
Bits = Mapping[str, int]  # of a module's weight by the module's name; 16 is float16, as is what is not named


@dataclass(frozen=True, slots=True)
class Source:
    """A float16 folder, opened. config: config.json's values. tensors: mapped, by their published names, the
    tied head left out. model: what they fill, itself empty."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    model: AnyModel

    @property
    def linears(self) -> list[str]:
        """The modules that are quantised."""
        return linears_of(self.model)

    def uniform(self, bits: int, embeddings: bool = False) -> dict[str, int]:
        """The same bits for all that is quantised. Raises InvalidInput: "bits_unknown", "embeddings_stay"."""
        if bits not in (4, 8):
            raise InvalidInput("bits_unknown", bits=bits)
        return dict.fromkeys(self.linears, bits) | (self.table(bits) if embeddings else {})

    def table(self, bits: int) -> dict[str, int]:
        """The bits of the word embeddings, to be quantised too. Raises InvalidInput("embeddings_stay")."""
        if not isinstance(self.model, ChatGLMModel):
            raise InvalidInput("embeddings_stay")
        return {self.model.EMBEDDING: bits}


def quantize_folder(
    source: Path,
    target: Path,
    bits: int | Bits,
    group_size: int | None = None,
    quantization_embeddings: bool = False,
    on_progress: OnProgress = lambda progress: None,
) -> None:
    """Write the folder `target`: `source` quantised, as one model.safetensors with all that it needs besides.

    bits: 4 or 8 for all linear layers, or 4, 8, 16 for each by its name (see bits_for_size). group_size and
    mixed bits: such a folder opens in glmui alone; without them it is what the published model is.
    on_progress: told the bytes of the source that are done; may raise to stop, and then nothing is left.
    Raises ModelError for a source that is no whole float16 ChatGLM folder, InvalidInput: "bits_unknown",
    "group_size_does_not_fit", "target_in_source", "target_not_empty", "target_no_space" ….
    """
    target = target.absolute()
    check_place(source, target)
    opened = open_source(source)
    plan = opened.uniform(bits, quantization_embeddings) if isinstance(bits, int) else dict(bits)
    forms = forms_of(opened, plan, group_size)
    with new_folder(target, folder_bytes(opened, plan, group_size)) as made:
        with TensorFile(made / "model.safetensors", forms) as file:
            for name, tensor in _converted(opened, plan, group_size, on_progress):
                file.write(name, tensor)
        (made / "config.json").write_text(_config_text(opened, plan, group_size), encoding="utf-8")
        for small in _small_files(source):
            shutil.copyfile(small, made / small.name)


def check_place(source: Path, target: Path) -> None:
    """Raises InvalidInput("target_in_source")."""
    if target.resolve().is_relative_to(source.resolve()):
        raise InvalidInput("target_in_source", source=source, target=target)


def open_source(folder: Path) -> Source:
    """Raises ModelError: no ChatGLM folder, not all of it there, or one that is quantised already."""
    config = check_folder(folder, EITHER)
    if config.quantization_bit:
        raise ModelError("model_quantised_already", folder=folder, bits=config.quantization_bit)
    tensors = {
        name: tensor
        for file in weight_files(folder)
        for name, tensor in read_file(file).items()
        if not name.startswith("lm_head.")
    }
    model = empty_model(config)
    check_layout(model, {n: t for n, t in tensors.items() if published_name(n)}, folder)
    return Source(folder, read_config(folder), tensors, model)


def linears_of(model: nn.Module) -> list[str]:
    """The names of the linear layers that the published code quantises."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEARS
    ]


def forms_of(source: Source, bits: Bits, group_size: int | None = None) -> dict[str, Form]:
    """Type and shape of every tensor of the result, in its order. Raises InvalidInput."""
    forms: dict[str, Form] = {}
    for name, tensor in source.tensors.items():
        module, width = name.removesuffix(".weight"), _width(bits, name)
        if width == 16:
            forms[name] = ("F16", tuple(tensor.shape))
            continue
        rows, columns = tensor.shape
        check_group_size(columns, width, group_size)
        forms[name] = ("I8", (rows, columns if width == 8 else -(-columns // 2)))
        scales = (rows, columns // group_size) if group_size else (rows,)
        forms[f"{module}.weight_scale"] = ("F16", scales)
    return forms


def folder_bytes(source: Source, bits: Bits, group_size: int | None = None) -> int:
    """The size of the whole result."""
    small = sum(file.stat().st_size for file in _small_files(source.folder))
    config = len(_config_text(source, bits, group_size).encode())
    return file_bytes(forms_of(source, bits, group_size)) + config + small


def _width(bits: Bits, name: str) -> int:
    return bits.get(name.removesuffix(".weight"), 16) if name.endswith(".weight") else 16


def _small_files(folder: Path) -> list[Path]:
    return [folder / name for name in _BESIDES if (folder / name).is_file()]


def config_of(source: Source, bits: Bits, group_size: int | None = None) -> dict[str, Any]:
    """config.json of the result. quantization_bit is that of most layers. Two keys are glmui's own:
    quantization_bits names the layers that have others, quantization_group_size tells of groups."""
    linears = {name: bits.get(name, 16) for name in source.linears}
    quantised = [width for width in linears.values() if width < 16]
    values = dict(source.config) | {"torch_dtype": "float16"}
    if not quantised:
        return values
    usual = max(sorted(set(quantised)), key=quantised.count)
    values["quantization_bit"] = usual
    if isinstance(source.model, ChatGLMModel):
        values["quantization_embeddings"] = source.model.EMBEDDING in bits
    if other := {name: width for name, width in linears.items() if width != usual}:
        values["quantization_bits"] = other
    if group_size:
        values["quantization_group_size"] = group_size
    return values


def _config_text(source: Source, bits: Bits, group_size: int | None) -> str:
    return json.dumps(config_of(source, bits, group_size), indent=2) + "\n"


def _converted(
    source: Source, bits: Bits, group_size: int | None, on_progress: OnProgress
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the result, in the order of forms_of. Raises ModelError("model_not_finite")."""
    total, done = sum(tensor.nbytes for tensor in source.tensors.values()), 0
    for name, tensor in source.tensors.items():
        half, width = tensor.half(), _width(bits, name)
        if not is_finite(half):
            raise ModelError("model_not_finite", folder=source.folder, name=name)
        if width == 16:
            yield name, half
        else:
            stored, scale = quantize_weight(
                half, width, group_size, wide=isinstance(source.model, ChatGLMModel)
            )
            yield name, stored
            yield f"{name}_scale", scale
        release(tensor)
        done += tensor.nbytes
        on_progress(Progress("converting", done / total, name, done, total))
