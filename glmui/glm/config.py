"""config.json as plain values: GLMConfig for ChatGLM-6B, GLM2Config for ChatGLM2 and 3."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from glmui.errors import ModelError
from glmui.text import model_files
from glmui.text.model_files import ChatGLMFamily

# Keys that a config.json must tell, and the largest value that is taken for a model's.
_LARGEST = {
    "vocab_size": 2**24,
    "padded_vocab_size": 2**24,
    "hidden_size": 2**20,
    "inner_hidden_size": 2**20,
    "ffn_hidden_size": 2**20,
    "kv_channels": 2**16,
    "num_layers": 2**10,
    "num_attention_heads": 2**10,
    "multi_query_group_num": 2**10,
    "seq_length": 2**24,
}


@dataclass(frozen=True, slots=True)
class GLMConfig:
    """The keys of ChatGLM-6B's config.json that shape the model, by their published names; no others.

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

    family: ClassVar[Literal["chatglm"]] = "chatglm"

    def __post_init__(self) -> None:
        _check_values(self)
        # Each head is cut in halves (two kinds of position), and each half in halves (rotation pairs).
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ModelError("model_config_bad", name="hidden_size", value=self.hidden_size)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Heads that have keys and values: here every one."""
        return self.num_attention_heads

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained for."""
        return self.max_sequence_length

    @property
    def table_weights(self) -> int:
        """Numbers in the embedding, which is the output head too."""
        return self.vocab_size * self.hidden_size

    @classmethod
    def from_values(cls, values: dict[str, Any], folder: Path | str = "") -> GLMConfig:
        """The config these JSON values describe."""
        if model_files.is_chatglm2(values):
            raise ModelError("model_is_chatglm2", folder=folder)
        if not values.get("position_encoding_2d", True):
            raise ModelError("model_config_bad", name="position_encoding_2d", value=False)
        return cls(**_known(cls, values, folder))


@dataclass(frozen=True, slots=True)
class GLM2Config:
    """The same for ChatGLM2-6B and ChatGLM3-6B, which share one network.

    family: which of the two; their half-precision rotary tables differ (rotary.py), and their prompts.
    seq_length: tokens the model was trained for. rope_ratio: above 1 in the 32k models.
    kv_channels: the size of a head; all heads together need not be hidden_size wide.
    multi_query_group_num: heads that have keys and values.
    """

    family: ChatGLMFamily
    padded_vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    kv_channels: int
    num_layers: int
    num_attention_heads: int
    multi_query_group_num: int
    seq_length: int
    rope_ratio: float = 1.0
    layernorm_epsilon: float = 1e-5
    add_qkv_bias: bool = True
    eos_token_id: int = 2
    pad_token_id: int = 0
    quantization_bit: int = 0

    def __post_init__(self) -> None:
        _check_values(self)
        if self.num_attention_heads % self.multi_query_group_num:
            raise ModelError("model_config_bad", name="multi_query_group_num", value=self.kv_heads)
        if self.kv_channels % 4:  # half of a head is turned, in pairs
            raise ModelError("model_config_bad", name="kv_channels", value=self.kv_channels)
        if self.rope_ratio <= 0:
            raise ModelError("model_config_bad", name="rope_ratio", value=self.rope_ratio)

    @property
    def vocab_size(self) -> int:
        return self.padded_vocab_size

    @property
    def head_size(self) -> int:
        return self.kv_channels

    @property
    def kv_heads(self) -> int:
        """Heads that have keys and values, each for as many query heads."""
        return self.multi_query_group_num

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained for."""
        return self.seq_length

    @property
    def query_width(self) -> int:
        """Numbers in all queries of a token."""
        return self.num_attention_heads * self.kv_channels

    @property
    def qkv_width(self) -> int:
        return self.query_width + 2 * self.multi_query_group_num * self.kv_channels

    @property
    def table_weights(self) -> int:
        """Numbers in the embedding and in the output head."""
        return 2 * self.padded_vocab_size * self.hidden_size

    @classmethod
    def from_values(cls, values: dict[str, Any], folder: Path | str, family: str) -> GLM2Config:
        """The config these JSON values describe."""
        for name, must_be in _ONE_WAY.items():
            if values.get(name, must_be) is not must_be:
                raise ModelError("model_config_bad", name=name, value=values[name])
        ratio = values.get("rope_ratio") or 1
        known = _known(cls, {**values, "family": family}, folder)
        return cls(**known | {"rope_ratio": float(ratio) if type(ratio) is int else ratio})


# What the published models all have, and other values of which nobody has seen.
_ONE_WAY = {
    "multi_query_attention": True,
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "tie_word_embeddings": False,
}

AnyConfig = GLMConfig | GLM2Config


def read_config(folder: Path | str, family: str = "") -> AnyConfig:
    """The config of whichever of the three models lies in `folder`, told from its files.

    family: "chatglm2" or "chatglm3" where the files leave that open. Raises ModelError.
    """
    return config_of(model_files.read_config(Path(folder)), folder, family)


def config_of(values: dict[str, Any], folder: Path | str, family: str = "") -> AnyConfig:
    """The same of a config.json's values. Raises ModelError."""
    if model_files.is_chatglm2(values):
        found = model_files.chatglm_family(Path(folder), values, family)
        return GLM2Config.from_values(values, folder, found)
    return GLMConfig.from_values(values, folder)


def _known(cls: type[AnyConfig], values: dict[str, Any], folder: Path | str) -> dict[str, Any]:
    """The values that `cls` has a place for. Raises ModelError for another kind of model."""
    if (kind := values.get("model_type")) != "chatglm":
        raise ModelError("model_type_unknown", folder=folder, model_type=kind)
    names = {field.name for field in fields(cls)}
    known = {k: v for k, v in values.items() if k in names and v is not None}
    for name in _LARGEST.keys() & names:
        if name not in known:
            raise ModelError("model_config_bad", name=name, value="missing")
    return known


def _check_values(config: AnyConfig) -> None:
    """Raise ModelError for sizes out of reach, values of a wrong kind, and bits that nothing is stored in."""
    for field in fields(config):
        value: Any = getattr(config, field.name)
        if field.name in _LARGEST:
            fits = type(value) is int and 0 < value <= _LARGEST[field.name]
        elif field.name == "family":
            fits = value in model_files.CHATGLM2_FAMILIES
        else:
            kind: Any = type(field.default)
            fits = type(value) is kind and 0 <= value < 2**31
        if not fits:
            raise ModelError("model_config_bad", name=field.name, value=value)
    if config.quantization_bit not in (0, 4, 8):
        raise ModelError("model_config_bad", name="quantization_bit", value=config.quantization_bit)
