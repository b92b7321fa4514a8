"""The tensors of a checkpoint, once they are exactly those that the model of its config.json has.

Runs in the importing process only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmui.errors import ModelError
from glmui.glm.checkpoint import FLOATS, check, empty_model, is_finite, read_file, read_folder, swap_quantized
from glmui.glm.config import read_config
from glmui.hub.source_folder import SourceFolder
from glmui.quantizing.folder import EITHER
from glmui.text.chat_template import ChatTokenizer
from glmui.text.chatglms import open_tokenizer

_OLDEST = (2, 10)  # torch.load(weights_only=True) of older ones has holes: CVE-2025-32434, CVE-2026-24747
_THREADS = 2
_SHOWN = 6  # problems in a sentence


def warm_up() -> None:
    """Have torch make its threads now, while threads can still be made."""
    torch.set_num_threads(min(_THREADS, torch.get_num_threads()))
    torch.ones(1 << 16).add_(1).sum()


def checked_tensors(source: SourceFolder) -> dict[str, Tensor]:
    """Every tensor the model needs, by its published name, mapped from the files; the tokenizer opens too.

    Raises ModelError for names, shapes, dtypes, places in memory or values that no such model has.
    """
    if any(file.suffix == ".bin" for file in source.weights) and _version() < _OLDEST:
        raise ModelError("import_old_torch", version=torch.__version__)
    return _chatglm(source) if source.family == "chatglm" else _causal_lm(source)


def _version() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])


def _chatglm(source: SourceFolder) -> dict[str, Tensor]:
    folder = source.folder
    config = read_config(folder, EITHER)
    open_tokenizer(folder, config.family, config.vocab_size)
    tensors = read_folder(folder)
    _check_places(tensors, source)
    model = empty_model(config)
    swap_quantized(model, tensors)
    check(model, tensors, folder)
    return tensors


def _causal_lm(source: SourceFolder) -> dict[str, Tensor]:
    """A model that transformers knows by itself."""
    folder = source.folder
    ChatTokenizer.from_folder(folder)
    tensors: dict[str, Tensor] = {}
    for file in source.weights:
        tensors.update((n, t) for n, t in read_file(file).items() if not n.endswith(".rotary_emb.inv_freq"))
    _check_places(tensors, source)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ModelError("model_tensors", folder=folder, count=1, problems=f"{name} is {tensor.dtype}")
        if not is_finite(tensor):
            raise ModelError("model_not_finite", folder=folder, name=name)
    model = _skeleton(folder, len(tensors))
    _check_names(model, tensors, folder)
    return tensors


def _check_names(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raises ModelError("model_tensors"). An output head that is tied may be in the files or not."""
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    missing = expected.keys() - found.keys() - set(model.all_tied_weights_keys)
    problems = [f"missing {name}" for name in missing]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    both = expected.keys() & found.keys()
    problems += [f"{n} is {found[n]}, not {expected[n]}" for n in both if found[n] != expected[n]]
    if problems:
        shown = "; ".join(sorted(problems)[:_SHOWN])
        raise ModelError("model_tensors", folder=folder, count=len(problems), problems=shown)


def _check_places(tensors: dict[str, Tensor], source: SourceFolder) -> None:
    """Raises ModelError("model_file_strange") for tensors that overlap themselves or one another: few bytes
    that claim to be many."""
    most = sum(file.stat().st_size for file in source.weights)
    if sum(tensor.nbytes for tensor in tensors.values()) > most or any(map(_overlaps, tensors.values())):
        raise ModelError("model_file_strange", folder=source.folder, file=source.weights[0].name)


def _overlaps(tensor: Tensor) -> bool:
    """Whether it is anything but a block of memory whose elements lie side by side, in whatever order."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != step:
            return True
        step *= size
    return False


def _skeleton(folder: Path, count: int) -> Any:
    """transformers' own model of this config, without values. count: of the tensors there are."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.utils.logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if getattr(config.get_text_config(), "num_hidden_layers", 0) > count:
            raise ModelError("model_config_bad", name="num_hidden_layers", value=config.num_hidden_layers)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # a config may be wrong in more ways than transformers has errors for
        first_line = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise ModelError("model_not_loadable", folder=folder, detail=first_line) from error
