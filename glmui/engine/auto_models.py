"""The three models as transformers' own: .generate and all that PreTrainedModel gives, .chat besides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from glmui.engine import cards
from glmui.engine.auto_config import ChatGLMConfig
from glmui.engine.auto_loading import load_as_asked
from glmui.engine.chatglm_api import Chatting
from glmui.engine.decoders import Step, decoder_of
from glmui.engine.generate import Decoder
from glmui.engine.loaded import kernel_folder
from glmui.glm.cache import SPARE, KVCache
from glmui.glm.chatglm2 import ChatGLM2Model
from glmui.glm.checkpoint import AnyModel
from glmui.glm.config import AnyConfig, GLM2Config, GLMConfig
from glmui.glm.model import ChatGLMModel
from glmui.quant import quantize
from glmui.quant.on_card import cards_of, forget_card_kernels, use_card_kernels


class Past:
    """What generate() hands from step to step: the KV cache, and the prompt's layout."""

    def __init__(self, cache: KVCache, layout: Any) -> None:
        self.cache, self.layout = cache, layout

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Called by beam search, whose rows are copies of one prompt: only the cache differs."""
        self.cache.reorder(beam_idx)


class _Generating(Chatting, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """What the models below have in common: .chat, .stream_chat, .quantize and transformers' .generate.

    `glm` is a loaded model to take over; without one the network gets random weights.
    """

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _parts: ClassVar[tuple[str, ...]]  # the plain model's attributes that are this one's too

    def __init__(self, config: ChatGLMConfig, glm: AnyModel | None = None) -> None:
        super().__init__(config)
        self._glm_config = config.glm
        glm = glm or self._fresh()
        self._whole = (glm,)  # in a tuple, so that its parts are not counted twice
        self._step: Step | None = None
        self._stepped: list[tuple[int, torch.dtype]] = []  # where the layers lie that it computes
        self._take_parts(glm)
        self.post_init()

    def _take_parts(self, glm: AnyModel) -> None:
        for name in self._parts:
            setattr(self, name, getattr(glm, name))

    def _fresh(self) -> AnyModel:
        raise NotImplementedError

    def _glm(self) -> Any:
        """The plain model, of the parts that are here now: quantize() and others put new ones in place."""
        (glm,) = self._whole
        for name in self._parts:
            if getattr(glm, name) is not (part := getattr(self, name)):
                setattr(glm, name, part)
        return glm

    def _init_weights(self, module: nn.Module) -> None:
        """The layers have initialised themselves."""

    @classmethod
    def _from_config(cls, config: ChatGLMConfig, **kwargs: Any) -> _Generating:
        """The model of this config: ChatGLM2's or 3's where it is theirs."""
        kind = _class_of(config.glm)
        model: _Generating = super(_Generating, kind)._from_config(config, **kwargs)
        return model

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *_: Any, config: Any = None, **kwargs: Any
    ) -> _Generating:
        """Open a folder as glm.checkpoint does. Raises ModelError.

        dtype (or torch_dtype): None or "auto" leaves weights as they are stored; call .half() or .float().
        device_map: "auto", a device, or {name prefix: device}. load_in_4bit, load_in_8bit: quantise a float
        checkpoint while loading. use_quantization_cache: see glmui.quantize. What else transformers takes
        here has no effect.
        """
        folder = Path(pretrained_model_name_or_path)
        config = config or ChatGLMConfig.from_pretrained(folder)
        glm = load_as_asked(folder, config.glm, config.chatglm_family, kwargs)
        model = _class_of(config.glm)(config, glm)
        model.eval()
        model.layers_changed()
        return model

    def layers_changed(self) -> None:
        """Have quantised layers that are on cards now computed by the cards' kernels."""
        glm = self._glm()
        self._step = None  # an old one would keep old layers
        found = cards.open_cards(cards_of(glm), kernel_folder())
        use_card_kernels(glm, found.kernels)
        self._take_parts(glm)
        self._step = cards.step_of(glm, found)
        self._stepped = _where_it_lies(glm) if self._step else []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Generating:
        """What .cuda(), .half() and their like do it by."""
        self._step = None
        forget_card_kernels(self)
        super()._apply(fn, recurse)
        self.layers_changed()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what computes tokens on a card belongs to the layers of one model."""
        return {**super().__getstate__(), "_step": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.layers_changed()

    def _decoder(self) -> Decoder:
        glm, step = self._glm(), self._step
        if step is not None and (_is_hooked(self) or _where_it_lies(glm) != self._stepped):
            step = None  # a graph runs no hooks, and what was moved or replaced may be none of its own
        return decoder_of(glm, step=step)

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
        glm = self._glm()
        if past_key_values is None:
            pads = None if attention_mask is None else (attention_mask == 0).sum(-1)
            cache = glm.new_cache(input_ids.shape[1] + (SPARE if use_cache else 0))
            past_key_values = Past(cache, glm.layout(input_ids, pads))
        past = past_key_values
        past.cache.make_room(input_ids.shape[1])
        logits = glm(input_ids, past.layout, past.cache, last_only=logits_to_keep == 1)
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
    ) -> _Generating:
        """Quantise the weights in place to 8 or 4 bits; see glmui.quantize."""
        wide = self._glm_config.family == "chatglm"
        return quantize(self, bits, use_quantization_cache, quantize_embeddings, wide=wide)

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Saves memory in training only; nothing to do here."""


class ChatGLMForConditionalGeneration(_Generating):
    """A ChatGLM-6B."""

    _parts = ("transformer", "lm_head")
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def _fresh(self) -> ChatGLMModel:
        assert isinstance(self._glm_config, GLMConfig)
        glm = ChatGLMModel(self._glm_config)
        if bits := self._glm_config.quantization_bit:
            quantize(glm, bits, quantization_embeddings=self._glm_config.quantization_embeddings)
        return glm

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.transformer.word_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.lm_head)


class ChatGLM2ForConditionalGeneration(_Generating):
    """A ChatGLM2-6B or ChatGLM3-6B."""

    _parts = ("transformer",)
    _no_split_modules = ["GLM2Block"]  # noqa: RUF012

    def _fresh(self) -> ChatGLM2Model:
        assert isinstance(self._glm_config, GLM2Config)
        glm = ChatGLM2Model(self._glm_config)
        return quantize(glm, bits, wide=False) if (bits := self._glm_config.quantization_bit) else glm

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.transformer.embedding.word_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.transformer.output_layer)


def _is_hooked(model: nn.Module) -> bool:
    """Whether somebody looks on at the forward pass of any part, or has put another in its place."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in model.modules()
    )


def _where_it_lies(model: nn.Module) -> list[tuple[int, torch.dtype]]:
    """The address and dtype of each weight."""
    return [(weight.data_ptr(), weight.dtype) for weight in model.parameters()]


def _class_of(config: AnyConfig) -> type[_Generating]:
    return (
        ChatGLMForConditionalGeneration if isinstance(config, GLMConfig) else ChatGLM2ForConditionalGeneration
    )
