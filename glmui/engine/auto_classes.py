"""ChatGLM-6B in transformers' own Auto classes, without trust_remote_code: register_auto_classes()."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from glmui.engine.chatglm import placement
from glmui.engine.chatglm_api import Chatting
from glmui.glm.cache import SPARE, KVCache
from glmui.glm.checkpoint import Place, everything_on, load_model
from glmui.glm.config import GLMConfig
from glmui.glm.layout import Layout
from glmui.glm.model import ChatGLMModel
from glmui.quant import quantize
from glmui.text import chatglm


def register_auto_classes() -> None:
    """Make AutoConfig, AutoTokenizer and AutoModel.from_pretrained(folder) open ChatGLM-6B folders.

    AutoModelForCausalLM and AutoModelForSeq2SeqLM open them too. Calling it again does nothing.
    """
    AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        auto.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)


class ChatGLMConfig(PreTrainedConfig):  # type: ignore[misc]
    """config.json as transformers carries it around; GLMConfig is what the model is built from."""

    model_type = "chatglm"
    attribute_map = {"num_hidden_layers": "num_layers"}  # noqa: RUF012  (transformers' own form)


class ChatGLMTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """transformers' face of text.chatglm.ChatGLMTokenizer, which is its attribute `chatglm`."""

    vocab_files_names = {"vocab_file": chatglm.VOCABULARY}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.chatglm = chatglm.ChatGLMTokenizer(vocab_file)
        for name, token in _SPECIAL_TOKENS.items():
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
        prompt = [*token_ids_0, chatglm.GMASK, chatglm.SOP]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, chatglm.EOP]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        file = Path(save_directory) / f"{filename_prefix or ''}{chatglm.VOCABULARY}"
        file.write_bytes(self.chatglm.file.read_bytes())
        return (str(file),)

    def _convert_token_to_id(self, token: str) -> int:
        return self.chatglm.id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.chatglm.name(index)

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.chatglm.decode(ids, skip_special_tokens)


_SPECIAL_TOKENS = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "[MASK]",
}


class Past:
    """What generate() hands from step to step: the KV cache, and the prompt's layout."""

    def __init__(self, cache: KVCache, layout: Layout) -> None:
        self.cache, self.layout = cache, layout

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Called by beam search, whose rows are copies of one prompt: only the cache differs."""
        self.cache.reorder(beam_idx)


class ChatGLMForConditionalGeneration(Chatting, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A ChatGLM-6B with .chat, .stream_chat, .quantize and transformers' .generate.

    `glm` is a loaded model to take over; without one the network gets random weights.
    """

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig, glm: ChatGLMModel | None = None) -> None:
        super().__init__(config)
        self._glm_config = GLMConfig.from_values(config.to_dict())
        if glm is None:
            glm = ChatGLMModel(self._glm_config)
            if bits := self._glm_config.quantization_bit:
                quantize(glm, bits, quantization_embeddings=self._glm_config.quantization_embeddings)
        self.transformer, self.lm_head = glm.transformer, glm.lm_head
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The layers have initialised themselves."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *_: Any, config: Any = None, **kwargs: Any
    ) -> ChatGLMForConditionalGeneration:
        """Open a folder as glm.checkpoint does. Raises ModelError.

        dtype (or torch_dtype): None or "auto" leaves weights as they are stored; call .half() or .float().
        device_map: "auto", a device, or {name prefix: device}. load_in_4bit, load_in_8bit: quantise a float
        checkpoint while loading. What else transformers takes here (use_quantization_cache …) has no effect.
        """
        folder = Path(pretrained_model_name_or_path)
        glm_config = GLMConfig.from_folder(folder)
        bits = 4 if kwargs.get("load_in_4bit") else 8 if kwargs.get("load_in_8bit") else 0
        place = _place(kwargs.get("device_map"), _dtype(kwargs), glm_config, bits)
        glm = load_model(folder, place, bits)
        model = cls(config or ChatGLMConfig.from_pretrained(folder), glm)
        model.eval()
        return model

    def _glm(self) -> ChatGLMModel:
        return ChatGLMModel.around(self._glm_config, self.transformer, self.lm_head)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Past | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [batch, n] → logits [batch, n, vocab], or [batch, 1, vocab] for logits_to_keep=1.

        attention_mask: [batch, n], 0 for the padding on the left. past_key_values: of the call before.
        """
        if past_key_values is None:
            pads = None if attention_mask is None else (attention_mask == 0).sum(-1)
            layout = Layout.of(input_ids, self._glm_config, pads)
            cache = KVCache(self._glm_config.num_layers, input_ids.shape[1] + (SPARE if use_cache else 0))
            past_key_values = Past(cache, layout)
        past = past_key_values
        past.cache.make_room(input_ids.shape[1])
        hidden = self.transformer(input_ids, past.layout, past.cache)
        logits = self.lm_head(hidden[:, -1:] if logits_to_keep == 1 else hidden)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past if use_cache else None)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Past | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The ids that are not in the cache yet."""
        known = 0 if past_key_values is None else past_key_values.cache.length
        return {
            "input_ids": input_ids[:, known:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": 1,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own

    def quantize(
        self, bits: int = 4, use_quantization_cache: bool = False, quantize_embeddings: bool = False, **_: Any
    ) -> ChatGLMForConditionalGeneration:
        """Quantise the weights in place to 8 or 4 bits; see glmui.quantize."""
        return quantize(self, bits, use_quantization_cache, quantize_embeddings)

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Saves memory in training only; nothing to do here."""

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.word_embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def _dtype(kwargs: dict[str, Any]) -> torch.dtype | None:
    wish = kwargs.get("dtype") or kwargs.get("torch_dtype")
    if isinstance(wish, str):
        return None if wish == "auto" else getattr(torch, wish)
    return wish


def _place(device_map: Any, dtype: torch.dtype | None, config: GLMConfig, bits: int) -> Place:
    if not isinstance(device_map, dict):
        if device_map is None:
            return everything_on("cpu", dtype)
        return placement(str(device_map), config, dtype, bits or config.quantization_bit).place
    prefixes = sorted(device_map, key=len, reverse=True)  # the most particular one counts

    def place(name: str) -> tuple[torch.device, torch.dtype | None]:
        return torch.device(device_map[next(p for p in prefixes if name.startswith(p))]), dtype

    return place
