"""The small files of a transformers model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glmui.errors import ModelError


def read_json(file: Path) -> dict[str, Any]:
    """The file's object; {} where there is no such file. Raises ModelError when it cannot be read."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError("model_file_broken", folder=file.parent, file=file.name) from error
    if not isinstance(values, dict):
        raise ModelError("model_file_broken", folder=file.parent, file=file.name)
    return values


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


def refuse_chatglm2(config: dict[str, Any], folder: Path | str) -> None:
    """Raise ModelError for a ChatGLM2 or 3: they name themselves "chatglm" too, but have other keys."""
    if "multi_query_attention" in config or "padded_vocab_size" in config or "ffn_hidden_size" in config:
        raise ModelError("model_is_chatglm2", folder=folder)
