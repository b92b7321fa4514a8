"""Extras for a base model, in folders of their own: a P-Tuning v2 prefix, a LoRA adapter. What their small
files say, looked at without opening the weights. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmui.errors import ModelError
from glmui.glm.config import AnyConfig
from glmui.glm.files import look_at, weight_files
from glmui.text import model_files

MODELS = {"chatglm": "ChatGLM-6B", "chatglm2": "ChatGLM2-6B", "chatglm3": "ChatGLM3-6B"}  # by family
_ADAPTER_CONFIG = "adapter_config.json"

# What PEFT's other settings make of an adapter is not computed here: the values each may have besides none.
# ("eva" and the like choose where training begins; "pissa", "olora" and "loftq" change the base's weights.)
_ALLOWED: dict[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (),
    "alpha_pattern": (),
    "arrow_config": (),
    "bias": ("none",),
    "enable_lora": (),
    "fan_in_fan_out": (),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    "kasa_config": (),
    "layer_replication": (),
    "lora_bias": (),
    "modules_to_save": (),
    "monteclora_config": (),
    "rank_pattern": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "use_bdlora": (),
    "use_dora": (),
    "use_qalora": (),
    "velora_config": (),
}


def check_prefix(folder: Path, config: AnyConfig) -> list[Path]:
    """The weight files of a prefix, where nothing else in its folder speaks against its fitting this model.

    Raises ModelError: no folder, no prefix, one of another model or with other layers, a file that is not
    what its name says.
    """
    _check_folder(folder)
    if (folder / _ADAPTER_CONFIG).is_file():
        raise ModelError("prefix_is_adapter", folder=folder)
    values = model_files.read_json(folder / "config.json")  # {} where only the weights were kept
    if values and config.family not in _families(folder, values):
        raise ModelError("prefix_other_model", folder=folder, model=MODELS[config.family])
    if (found := values.get("num_layers", config.num_layers)) != config.num_layers:
        raise ModelError("prefix_other_layers", folder=folder, found=found, layers=config.num_layers)
    try:
        files = weight_files(folder)
    except ModelError as error:
        raise ModelError("prefix_not_one", folder=folder) from error
    for file in files:
        look_at(file)
    return files


def _families(folder: Path, values: dict[str, Any]) -> tuple[str, ...]:
    """The families that a config.json may be of."""
    try:
        return (model_files.chatglm_family(folder, values),)
    except ModelError:
        return model_files.CHATGLM2_FAMILIES


def may_hold_prefix(folder: Path) -> bool:
    """Whether a model's own weights may hold a prefix: those of a fine-tune that saved the whole model."""
    return bool(model_files.read_json(folder / "config.json").get("pre_seq_len"))


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adapter's folder: its weights, the rank of its matrices, and what B A is multiplied by."""

    file: Path
    rank: int
    scale: float


def check_adapter(folder: Path, config: AnyConfig) -> Lora:
    """What an adapter's folder holds, where nothing in adapter_config.json speaks against it.

    Raises ModelError: no folder, no adapter, another kind than plain LoRA, one of another model.
    """
    _check_folder(folder)
    if not (folder / _ADAPTER_CONFIG).is_file():
        raise ModelError("adapter_not_one", folder=folder, file=_ADAPTER_CONFIG)
    values = model_files.read_json(folder / _ADAPTER_CONFIG)
    if (kind := values.get("peft_type")) != "LORA":
        raise ModelError("adapter_kind", folder=folder, kind=kind)
    for name, allowed in _ALLOWED.items():
        if (value := values.get(name)) and value not in allowed:
            raise ModelError("adapter_setting", folder=folder, name=name, value=value)
    base = str(values.get("base_model_name_or_path", "")).lower()
    told = [family for family in model_files.CHATGLM2_FAMILIES if family in base]
    if len(told) == 1 and told[0] != config.family:
        raise ModelError("adapter_other_model", folder=folder, model=MODELS[config.family])
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            look_at(folder / name)
            return Lora(folder / name, *_rank_and_scale(folder, values))
    raise ModelError("adapter_not_one", folder=folder, file="adapter_model.safetensors")


def _rank_and_scale(folder: Path, values: dict[str, Any]) -> tuple[int, float]:
    """r, and alpha / r, or alpha / sqrt(r) where that is said (Kalajdzievski, 2023). Raises ModelError."""
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ModelError("adapter_setting", folder=folder, name="r", value=rank)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise ModelError("adapter_setting", folder=folder, name="lora_alpha", value=alpha)
    return rank, alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError("model_no_folder", folder=folder)
