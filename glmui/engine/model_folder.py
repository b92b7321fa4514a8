"""A model's folder, read without opening its weights: what config.json tells, and whether it is complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glmui.errors import ModelError
from glmui.text.model_files import listed_files, read_config, read_template, refusal, refuse_pointer

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
    refuse_pointer(folder / "tokenizer.json")
    for file in weight_files(folder):
        refuse_pointer(file)
    if read_template(folder) is None:
        raise ModelError("model_no_chat_template", folder=folder)


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, all there. Raises ModelError."""
    files = listed_files(folder, "model.safetensors")
    if not files and any(folder.glob("*.bin")):
        raise ModelError("model_only_bin", folder=folder)
    for file in files or [folder / "model.safetensors"]:
        if not file.is_file() or file.stat().st_size == 0:
            raise refusal("model_file_missing", file)
    return files
