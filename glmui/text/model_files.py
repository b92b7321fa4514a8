"""The small files of a transformers model folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from glmui.errors import ModelError

Accident = Literal["", "Git LFS pointer", "HTML page"]


def accident(start: bytes) -> Accident:
    """What a file that begins so is, where it is one of the usual accidents of a download; else ""."""
    if start.startswith(b"version https://git-lfs"):
        return "Git LFS pointer"
    if re.match(rb"\s*<(!doctype|html|head|body|\?xml)", start, re.IGNORECASE):
        return "HTML page"
    return ""


def refusal(code: str, file: Path) -> ModelError:
    """The error of that code about that file."""
    return ModelError(code, folder=file.parent, file=file.name)


def read_json(file: Path) -> dict[str, Any]:
    """The file's object; {} where there is no such file. Raises ModelError when it cannot be read."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refusal("model_file_broken", file) from error
    if not isinstance(values, dict):
        raise refusal("model_file_broken", file)
    return values


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, as it stands. Raises ModelError: no folder, no file, a Git LFS pointer, no JSON object."""
    if not folder.is_dir():
        raise ModelError("model_no_folder", folder=folder)
    refuse_pointer(folder / "config.json")
    return read_json(folder / "config.json")


def refuse_pointer(file: Path) -> None:
    """Raise ModelError where `file` is missing, or a Git LFS pointer stands in its place."""
    if not file.is_file():
        raise refusal("model_file_missing", file)
    if accident(beginning(file)) == "Git LFS pointer":
        raise refusal("model_lfs_pointer", file)


def beginning(file: Path) -> bytes:
    """Enough of the file to tell what it is."""
    with file.open("rb") as opened:
        return opened.read(200)


def listed_files(folder: Path, name: str) -> list[Path]:
    """The weight files in place of `name` ("model.safetensors"): those that its index lists, or itself; []
    where neither is there. Raises ModelError for a broken index; what it lists need not be there."""
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return [folder / name] if (folder / name).exists() else []
    places = read_json(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise refusal("model_file_broken", index)
    return [folder / name for name in sorted(set(names))]


def read_template(folder: Path) -> str | None:
    """The chat template: of chat_template.jinja, else tokenizer_config.json, else chat_template.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_json(folder / name).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if isinstance(found, str):
            return found
    return None


ChatGLMFamily = Literal["chatglm", "chatglm2", "chatglm3"]
CHATGLM2_FAMILIES: tuple[ChatGLMFamily, ...] = ("chatglm2", "chatglm3")

# What the published configs give as seq_length, the 32k models (which have a rope_ratio) aside.
_LENGTHS: tuple[tuple[int, ChatGLMFamily], ...] = ((32768, "chatglm2"), (8192, "chatglm3"))


def is_chatglm2(config: dict[str, Any]) -> bool:
    """Whether a config.json of type "chatglm" is of ChatGLM2 or 3, which share a network and its keys."""
    return any(key in config for key in ("multi_query_attention", "padded_vocab_size", "ffn_hidden_size"))


def is_in_doubt(folder: Path) -> bool:
    """Whether a folder's files fit both ChatGLM2 and 3."""
    try:
        chatglm_family(folder, read_json(folder / "config.json"))
    except ModelError as error:
        return error.code == "model_family_in_doubt"
    return False


def chatglm_family(folder: Path, config: dict[str, Any], family: str = "") -> ChatGLMFamily:
    """Which of the three a folder of type "chatglm" holds, told from its files and never from its name.

    ChatGLM3's tokenizer_config.json has a chat template, ChatGLM2's has none; else the config's
    _name_or_path tells, else its length. family: "chatglm2" or "chatglm3" for where all of them are silent.
    Raises ModelError("model_family_in_doubt").
    """
    if not is_chatglm2(config):
        return "chatglm"
    if isinstance(read_json(folder / "tokenizer_config.json").get("chat_template"), str):
        return "chatglm3"
    name = str(config.get("_name_or_path", "")).lower()
    told = [found for found in CHATGLM2_FAMILIES if found in name]
    if (config.get("rope_ratio") or 1) == 1:
        told += [found for length, found in _LENGTHS if config.get("seq_length") == length]
    told += [found for found in CHATGLM2_FAMILIES if found == family]
    if told:
        return told[0]
    raise ModelError("model_family_in_doubt", folder=folder)
