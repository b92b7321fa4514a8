"""The three models' tokenizers as transformers knows tokenizers; AutoTokenizer opens them by these."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import BatchEncoding, PreTrainedTokenizer

from glmui.glm.config import read_config
from glmui.text import chatglm, chatglm2, chatglm3
from glmui.text.vocabulary import EOP, GMASK, NAMES, SOP
from glmui.types import Role


class ChatGLMTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """transformers' face of text.chatglm.ChatGLMTokenizer, which is its attribute `chatglm`."""

    family: ClassVar[str] = "chatglm"
    opens: ClassVar[type[Any]] = chatglm.ChatGLMTokenizer
    vocab_files_names = {"vocab_file": chatglm.VOCABULARY}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    special = {  # noqa: RUF012
        "bos_token": "<sop>",
        "eos_token": "<eop>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "[MASK]",
    }

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *inputs: Any, **kwargs: Any
    ) -> PreTrainedTokenizer:
        """The folder's tokenizer: ChatGLM2's or 3's where it is theirs."""
        folder = Path(pretrained_model_name_or_path)
        config = kwargs.get("config")
        family = getattr(config, "chatglm_family", "") or kwargs.pop("chatglm_family", "")
        found = read_config(folder, family).family
        if found == cls.family:
            return super().from_pretrained(folder, *inputs, **kwargs)
        return _FACES[found].from_pretrained(folder, *inputs, **kwargs)

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.chatglm = self.opens(vocab_file)
        for name, token in self.special.items():
            kwargs.setdefault(name, token)
        kwargs["padding_side"] = "left"  # the answer follows the prompt at once
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.chatglm)

    def get_vocab(self) -> dict[str, int]:
        return {self.chatglm.name(i): i for i in range(len(self.chatglm))}

    def tokenize(self, text: str, **_: Any) -> list[str]:
        """Pieces of `text`; a typed <sop>, <eop>, <unk>, <pad> or [MASK] is special, as published."""
        return [self.chatglm.name(i) for i in self.chatglm.encode(text, special=False)]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        prompt = [*token_ids_0, GMASK, SOP]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, EOP]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        file = Path(save_directory) / f"{filename_prefix or ''}{self.vocab_files_names['vocab_file']}"
        file.write_bytes(self.chatglm.file.read_bytes())
        return (str(file),)

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.chatglm.id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.chatglm.name(index))

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return str(self.chatglm.decode(ids, skip_special_tokens))


class ChatGLM2Tokenizer(ChatGLMTokenizer):
    """The same of text.chatglm2.ChatGLM2Tokenizer."""

    family: ClassVar[str] = "chatglm2"
    opens = chatglm2.ChatGLM2Tokenizer
    vocab_files_names = {"vocab_file": NAMES["chatglm2"]}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}  # noqa: RUF012

    def tokenize(self, text: str, **_: Any) -> list[str]:
        """Pieces of `text`; nothing typed is special."""
        return [self.chatglm.name(i) for i in self.chatglm.text_ids(text)]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        prompt = [chatglm2.GMASK, chatglm2.SOP, *token_ids_0]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, chatglm2.EOS]

    def _pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """With positions, which padding on the left has none of."""
        count = len(encoded_inputs["input_ids"])
        padded = super()._pad(encoded_inputs, *args, **kwargs)
        if "position_ids" not in padded:
            padded["position_ids"] = [0] * (len(padded["input_ids"]) - count) + list(range(count))
        return padded


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """The same of text.chatglm3.ChatGLM3Tokenizer."""

    family: ClassVar[str] = "chatglm3"
    opens = chatglm3.ChatGLM3Tokenizer

    def build_chat_input(
        self, query: str, history: list[dict[str, Any]] | None = None, role: Role = "user"
    ) -> BatchEncoding:
        """The prompt that chat() would give, as tensors."""
        turns = [*map(chatglm3.Turn.of, history or []), chatglm3.Turn(role, query)]
        ids = chatglm3.chat_ids(self.chatglm, turns)
        return self.prepare_for_model(
            ids, add_special_tokens=False, return_tensors="pt", prepend_batch_axis=True
        )


_FACES: dict[str, type[ChatGLMTokenizer]] = {
    "chatglm": ChatGLMTokenizer,
    "chatglm2": ChatGLM2Tokenizer,
    "chatglm3": ChatGLM3Tokenizer,
}
