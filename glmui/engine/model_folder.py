"""A model's folder, read without opening its weights: what config.json tells, and whether it is complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glmui.errors import ModelError
from glmui.text.model_files import accident, read_json, read_template

Family = Literal["echo", "chatglm", "causal_lm"]
ECHO = "echo"  # in the place of a folder: the scripted engine

_LENGTH_KEYS = ("max_position_embeddings", "max_sequence_length", "seq_length", "n_positions")


@dataclass(frozen=True, slots=True)
class Description:
    """What config.json tells of a model. context_length: ids it was trained for, 0 when unknown."""

    family: Family
    model_type: str
    context_length: int
    dtype: str


def describe(folder: Path | str) -> Description:
    """Read config.json, no more. Raises ModelError when it is missing or broken."""
    if str(folder) == ECHO:
        return Description("echo", ECHO, 0, "")
    config = read_config(Path(folder))
    model_type = str(config.get("model_type", ""))
    inner = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    lengths = [inner[key] for key in _LENGTH_KEYS if isinstance(inner.get(key), int)]
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    family: Family = "chatglm" if model_type == "chatglm" else "causal_lm"
    return Description(family, model_type, lengths[0] if lengths else 0, dtype)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises ModelError."""
    if not folder.is_dir():
        raise ModelError("model_no_folder", folder=folder)
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError("model_file_missing", folder=folder, file=file.name)
    refuse_pointer(file)
    return read_json(file)


def check_causal_lm(folder: Path) -> None:
    """Raise ModelError where a transformers chat model lacks something."""
    config = read_config(folder)
    model_type = str(config.get("model_type", ""))
    architectures = config.get("architectures") or [""]
    if not model_type or not str(architectures[0]).endswith(
        ("CausalLM", "LMHeadModel", "ConditionalGeneration")
    ):
        raise ModelError("model_not_chat", folder=folder, model_type=model_type or "?")
    if isinstance(foreign := config.get("quantization_config"), dict):
        raise ModelError("model_foreign_format", folder=folder, format=foreign.get("quant_method", "?"))
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise ModelError("model_file_missing", folder=folder, file=tokenizer.name)
    refuse_pointer(tokenizer)
    for file in weight_files(folder):
        refuse_pointer(file)
    if read_template(folder) is None:
        raise ModelError("model_no_chat_template", folder=folder)


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, all there. Raises ModelError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _shards(index)
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif any(folder.glob("*.bin")):
        raise ModelError("model_only_bin", folder=folder)
    else:
        raise ModelError("model_file_missing", folder=folder, file="model.safetensors")
    for name in names:
        if not (folder / name).is_file() or (folder / name).stat().st_size == 0:
            raise ModelError("model_file_missing", folder=folder, file=name)
    return [folder / name for name in names]


def _shards(index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ModelError("model_file_broken", folder=index.parent, file=index.name)
    return sorted(set(names))


def refuse_pointer(file: Path) -> None:
    """Raise ModelError("model_lfs_pointer") when `file` is a Git LFS pointer in place of the real one."""
    with file.open("rb") as opened:
        if accident(opened.read(200)) == "Git LFS pointer":
            raise ModelError("model_lfs_pointer", folder=file.parent, file=file.name)
