"""ChatGLM's config.json as transformers carries it around."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from glmui.glm.config import AnyConfig, GLM2Config, config_of, read_config
from glmui.text.model_files import CHATGLM2_FAMILIES

# The folder's name, which tells nothing, and what transformers has its own idea of.
_NOT_TOLD = ("_name_or_path", "tie_word_embeddings")


class ChatGLMConfig(PreTrainedConfig):  # type: ignore[misc]
    """What transformers knows of a ChatGLM; what the model is built from is `glm`.

    chatglm_family: "chatglm2" or "chatglm3" for a folder whose files fit both.
    """

    model_type = "chatglm"
    attribute_map = {"num_hidden_layers": "num_layers"}  # noqa: RUF012  (transformers' own form)

    def __init__(self, chatglm_family: str = "", **kwargs: Any) -> None:
        self.chatglm_family = chatglm_family
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> ChatGLMConfig:
        """Read the folder's config.json. Raises ModelError."""
        folder = str(pretrained_model_name_or_path)
        config: ChatGLMConfig = super().from_pretrained(folder, **{"name_or_path": folder, **kwargs})
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> ChatGLMConfig:
        """name_or_path: the folder, whose other files tell which model it holds. AutoConfig comes here."""
        if folder := kwargs.get("name_or_path"):
            told = kwargs.pop("chatglm_family", "") or config_dict.get("chatglm_family", "")
            config_dict = {**config_dict, "chatglm_family": read_config(folder, told).family}
        config: ChatGLMConfig = super().from_dict(config_dict, **kwargs)
        return config

    @property
    def glm(self) -> AnyConfig:
        """The plain config. Raises ModelError."""
        values = {name: value for name, value in self.to_dict().items() if name not in _NOT_TOLD}
        if self.chatglm_family in CHATGLM2_FAMILIES:
            return GLM2Config.from_values(values, "", self.chatglm_family)
        return config_of(values, "")
