"""From a published folder of any of the three models to a torch module: sharded or single .bin or
.safetensors, FP16, INT8 or INT4.

Files are mapped, not read: a tensor that needs no other dtype or device becomes a weight as it lies in
the file. A .bin is a pickle, and only torch's restricted reader (`weights_only`) ever touches it.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from glmui.errors import ModelError
from glmui.glm.chatglm2 import ChatGLM2Model
from glmui.glm.config import AnyConfig, GLMConfig, read_config
from glmui.glm.files import look_at, weight_files
from glmui.glm.model import ChatGLMModel
from glmui.quant import QuantizedEmbedding, QuantizedLinear, quantize
from glmui.quant.mapped import release
from glmui.quant.packing import BLOCK
from glmui.text.model_files import refusal

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
PREFIX = "transformer.prefix_encoder."  # of a P-Tuning v2 prefix, see prefix.py
_WORTH_RELEASING = 1 << 20  # bytes
AnyModel = ChatGLMModel | ChatGLM2Model

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
    family: str = "",
    change: Callable[[str, nn.Module], None] | None = None,
    ready: Mapping[str, nn.Module] | None = None,
) -> AnyModel:
    """Open the folder of a ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B.

    place: where each tensor goes; None is the CPU in float32, where all numbers are exact.
    bits: 4 or 8 quantises a float checkpoint layer by layer while loading.
    family: see config.read_config.
    change: called with each part by its name before it is quantised and placed (adapter.merge).
    ready: layers by name that a former load made of this very checkpoint. They take their places as they
    are, and the checkpoint's values are not read again to see whether they are finite.
    Memory of its own: what the result takes, less what stays in the mapped files; what went to a card leaves
    memory part by part. The embedding keeps the file's float16 where float32 is computed with, since widening
    it in use is exact.
    Raises ModelError: no model, another model, a file that is not what its name says, tensors that are
    missing, unexpected, of the wrong shape or dtype, or not finite.
    """
    folder, place = Path(folder), place or everything_on("cpu", torch.float32)
    config = read_config(folder, family)
    tensors = read_folder(folder)
    model = empty_model(config)
    swap_quantized(model, tensors)
    (check_layout if ready else check)(model, tensors, folder)
    for name, tensor in tensors.items():
        assign(model, name, tensor)
    del tensors
    _put(model, {name: layer for name, layer in (ready or {}).items() if name != model.HEAD})
    parts = list(model.parts())
    for done, (name, module) in enumerate(parts):
        read = [parameter.data for parameter in module.parameters()]
        if change:
            change(name, module)
        if bits:
            quantize(module, bits, group_size=group_size, wide=isinstance(model, ChatGLMModel))
        _settle(model, name, module, place)
        _let_go(read, module)
        on_progress((done + 1) / len(parts))
    model.tie()
    _put(model, {name: layer for name, layer in (ready or {}).items() if name == model.HEAD})
    return model.eval()


def _put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def empty_model(config: AnyConfig) -> AnyModel:
    """The model of a config, all tensors on the meta device: their names, shapes and dtypes."""
    with torch.device("meta"):
        return ChatGLMModel(config) if isinstance(config, GLMConfig) else ChatGLM2Model(config)


def published_name(name: str) -> str | None:
    """Our name of a checkpoint's tensor: the same, or None for what is not needed.

    The rotary frequencies follow from the config, and ChatGLM-6B's output head is the embedding: where a
    file holds both, the embedding counts. (ChatGLM2's and 3's is a tensor of its own, and has another name.)
    A prefix, which a fine-tune of the whole model may have saved with it, is read by prefix.py.
    """
    computed = name.endswith((".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq"))
    return None if computed or name.startswith(("lm_head.", PREFIX)) else name


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


def swap_quantized(model: AnyModel, tensors: dict[str, Tensor]) -> None:
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
        elif isinstance(model, ChatGLMModel):
            embedding = QuantizedEmbedding.of(module, bits, group_size)
            model.set_submodule(name, embedding)
            model.lm_head = embedding.head()


def check(model: AnyModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raises ModelError: "model_tensors" as check_layout does, "model_not_finite"."""
    check_layout(model, tensors, folder)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ModelError("model_not_finite", folder=folder, name=name)


def check_layout(model: AnyModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raises ModelError("model_tensors") listing what is missing, unexpected, or not as it should be.

    Reads no values.
    """
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


def _let_go(read: Sequence[Tensor], part: nn.Module) -> None:
    """Give back the memory of the mapped tensors that the part has copies of by now."""
    used = {parameter.data_ptr() for parameter in part.parameters()}
    for tensor in read:
        if tensor.nbytes >= _WORTH_RELEASING and not tensor.is_meta and tensor.data_ptr() not in used:
            release(tensor)


def _settle(model: AnyModel, prefix: str, part: nn.Module, place: Place) -> None:
    """Move a part's tensors to their device and dtype, where they are not there already."""
    for name, parameter in list(part.named_parameters()):
        if parameter.is_meta:  # inside accelerate's init_empty_weights nothing has values
            continue
        device, dtype = place(f"{prefix}.{name}")
        widened = prefix in (model.EMBEDDING, model.HEAD) and name == "weight" and dtype == torch.float32
        scale = name.endswith("weight_scale") and dtype == torch.bfloat16  # which would round it to 8 bits
        keeps = dtype is None or widened or scale or not parameter.is_floating_point()
        assign(part, name, parameter.data.to(device, parameter.dtype if keeps else dtype))
