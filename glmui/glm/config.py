"""ChatGLM-6B's config.json as plain values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from glmui.errors import ModelError
from glmui.text import model_files

# What a config.json must tell, and the largest value that is taken for a model's.
_SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "inner_hidden_size": 2**20,
    "num_layers": 2**10,
    "num_attention_heads": 2**10,
}


@dataclass(frozen=True, slots=True)
class GLMConfig:
    """The keys of config.json that shape the model, by their published names; others are ignored.

    quantization_bit: 0 (float16), 8 or 4, for the four linear layers of each block.
    Raises ModelError("model_config_bad") for values no model can have.
    """

    vocab_size: int
    hidden_size: int
    inner_hidden_size: int
    num_layers: int
    num_attention_heads: int
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    bos_token_id: int = 130004  # <sop>: the answer begins after it
    eos_token_id: int = 130005  # <eop>
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    pad_token_id: int = 3
    quantization_bit: int = 0
    quantization_embeddings: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if field.name in _SIZES:
                fits = type(value) is int and 0 < value <= _SIZES[field.name]
            else:
                kind: Any = type(field.default)
                fits = type(value) is kind and 0 <= value < 2**31
            if not fits:
                raise ModelError("model_config_bad", name=field.name, value=value)
        # Each head is cut in halves (two kinds of position), and each half in halves (rotation pairs).
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ModelError("model_config_bad", name="hidden_size", value=self.hidden_size)
        if self.quantization_bit not in (0, 4, 8):
            raise ModelError("model_config_bad", name="quantization_bit", value=self.quantization_bit)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_folder(cls, folder: Path | str) -> GLMConfig:
        """Read config.json. Raises ModelError: no folder, no file, no JSON, or another model's."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelError("model_no_folder", folder=folder)
        return cls.from_values(read_json(folder, "config.json"), folder)

    @classmethod
    def from_values(cls, values: dict[str, Any], folder: Path | str = "") -> GLMConfig:
        """The config these JSON values describe."""
        refuse_other_models(values, folder)
        names = {field.name for field in fields(cls)}
        known = {k: v for k, v in values.items() if k in names and v is not None}
        for name in _SIZES:
            if name not in known:
                raise ModelError("model_config_bad", name=name, value="missing")
        return cls(**known)


def refuse_other_models(values: dict[str, Any], folder: Path | str) -> None:
    """Raise ModelError for any config but ChatGLM-6B's."""
    kind = values.get("model_type")
    if kind != "chatglm":
        raise ModelError("model_type_unknown", folder=folder, model_type=kind)
    model_files.refuse_chatglm2(values, folder)
    if not values.get("position_encoding_2d", True):
        raise ModelError("model_config_bad", name="position_encoding_2d", value=False)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the model's folder. Raises ModelError when it is missing or is something else."""
    if not (folder / name).is_file():
        raise ModelError("model_file_missing", folder=folder, file=name)
    return model_files.read_json(folder / name)
