"""From a published folder to a model: sharded or single .bin or .safetensors, FP16, INT8 or INT4.

Files are mapped, not read: a tensor that needs no other dtype or device becomes a weight as it lies in
the file. A .bin is a pickle, and only torch's restricted reader (`weights_only`) ever touches it.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from glmui.errors import ModelError
from glmui.glm.config import GLMConfig
from glmui.glm.files import look_at, refusal, weight_files
from glmui.glm.model import ChatGLMModel
from glmui.quant import QuantizedEmbedding, QuantizedLinear, quantize
from glmui.quant.packing import BLOCK

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
EMBEDDING = "transformer.word_embeddings"

# Says for a tensor's name where it goes and which dtype its floats are computed with (None: as stored).
Place = Callable[[str], tuple[torch.device, torch.dtype | None]]


def everything_on(device: torch.device | str, dtype: torch.dtype | None) -> Place:
    """The plain Place: one device, one dtype."""
    place = (torch.device(device), dtype)
    return lambda name: place


def load_model(
    folder: Path | str,
    place: Place | None = None,
    bits: int = 0,
    group_size: int | None = None,
    on_progress: Callable[[float], None] = lambda part: None,
) -> ChatGLMModel:
    """Open a ChatGLM-6B folder.

    place: where each tensor goes; None is the CPU in float32, where all numbers are exact.
    bits: 4 or 8 quantises a float checkpoint layer by layer while loading.
    Memory of its own: what the result takes, less what stays in the mapped files. The embedding keeps the
    file's float16 where float32 is computed with, since widening it in use is exact.
    Raises ModelError: no model, another model, a file that is not what its name says, tensors that are
    missing, unexpected, of the wrong shape or dtype, or not finite.
    """
    folder, place = Path(folder), place or everything_on("cpu", torch.float32)
    config = GLMConfig.from_folder(folder)
    tensors = read_folder(folder)
    with torch.device("meta"):
        model = ChatGLMModel(config)
    swap_quantised(model, tensors)
    check(model, tensors, folder)
    for name, tensor in tensors.items():
        assign(model, name, tensor)
    del tensors
    for done, (name, module) in enumerate(_parts(model)):
        if bits:
            quantize(module, bits, group_size=group_size)
        _settle(name, module, place)
        on_progress((done + 1) / (config.num_layers + 2))
    model.tie()
    return model.eval()


def published_name(name: str) -> str | None:
    """Our name of a checkpoint's tensor: the same, or None for what is not needed.

    The rotary frequencies follow from the config, and the output head is the embedding: where a file
    holds both, the embedding counts.
    """
    if name.endswith(".rotary_emb.inv_freq") or name.startswith("lm_head."):
        return None
    return name


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by our names, mapped from their files. Raises ModelError."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        for name, tensor in read_file(file).items():
            if (ours := published_name(name)) is not None:
                tensors[ours] = tensor
    return tensors


def read_file(file: Path) -> dict[str, Tensor]:
    """One file's tensors, mapped. Raises ModelError saying what the file is instead."""
    look_at(file)
    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise refusal("model_file_refused", file) from error
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise refusal("model_file_cut", file) from error
    if not isinstance(loaded, dict) or not all(_is_dense(t) for t in loaded.values()):
        raise refusal("model_file_refused", file)
    return loaded


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def swap_quantised(model: ChatGLMModel, tensors: dict[str, Tensor]) -> None:
    """Replace each layer whose scale is in the file by its quantised form (still without values)."""
    modules = dict(model.named_modules())
    for scale in [name for name in tensors if name.endswith(".weight_scale")]:
        name = scale.removesuffix(".weight_scale")
        module, weight = modules.get(name), tensors.get(f"{name}.weight")
        if not isinstance(module, nn.Linear | nn.Embedding) or weight is None or weight.dim() != 2:
            continue  # check() will name it
        columns = module.weight.shape[1]
        bits = 8 if weight.shape[1] == columns else 4
        groups = tensors[scale].shape[1] if tensors[scale].dim() == 2 else 0
        group_size = columns // groups if groups and columns % groups == 0 else None
        if isinstance(module, nn.Linear):
            model.set_submodule(name, QuantizedLinear.of(module, bits, group_size))
        elif name == EMBEDDING:
            embedding = QuantizedEmbedding.of(module, bits, group_size)
            model.set_submodule(name, embedding)
            model.lm_head = embedding.head()


def check(model: ChatGLMModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raises ModelError("model_tensors") listing what is missing, unexpected, or not as it should be."""
    expected = {name: value for name, value in model.state_dict().items() if published_name(name)}
    problems = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        wish, found = expected[name], tensors[name]
        if wish.shape != found.shape:
            problems.append(f"{name} is {list(found.shape)}, not {list(wish.shape)}")
        elif not (found.dtype in FLOATS if wish.is_floating_point() else found.dtype == wish.dtype):
            problems.append(f"{name} is {found.dtype}")
    if problems:
        raise ModelError(
            "model_tensors", folder=folder, count=len(problems), problems=_first(sorted(problems))
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ModelError("model_not_finite", folder=folder, name=name)


def _first(problems: list[str], shown: int = 6) -> str:
    return "; ".join(problems[:shown]) + ("; …" if len(problems) > shown else "")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity, read block by block."""
    blocks = torch.split(tensor.flatten(), BLOCK)
    return all(math.isfinite(end) for block in blocks for end in torch.aminmax(block))


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` itself the parameter `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))


def _parts(model: ChatGLMModel) -> Iterator[tuple[str, nn.Module]]:
    """The embedding, each block, and the last norm, with their names."""
    body = model.transformer
    yield EMBEDDING, body.word_embeddings
    for place, block in enumerate(body.layers):
        yield f"transformer.layers.{place}", block
    yield "transformer.final_layernorm", body.final_layernorm


def _settle(prefix: str, part: nn.Module, place: Place) -> None:
    """Move a part's tensors to their device and dtype, where they are not there already."""
    for name, parameter in list(part.named_parameters()):
        if parameter.is_meta:  # inside accelerate's init_empty_weights nothing has values
            continue
        device, dtype = place(f"{prefix}.{name}")
        widened_in_use = prefix == EMBEDDING and name == "weight" and dtype == torch.float32
        keeps = dtype is None or widened_in_use or not parameter.is_floating_point()
        assign(part, name, parameter.data.to(device, parameter.dtype if keeps else dtype))
