"""The three models in transformers' own Auto classes, without trust_remote_code: register_auto_classes()."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from glmui.engine.auto_config import ChatGLMConfig
from glmui.engine.auto_models import ChatGLMForConditionalGeneration
from glmui.engine.auto_tokenizers import ChatGLMTokenizer


def register_auto_classes() -> None:
    """Make AutoConfig, AutoTokenizer and AutoModel.from_pretrained(folder) open ChatGLM folders.

    Which of the three a folder holds is told from its files.

    AutoModelForCausalLM and AutoModelForSeq2SeqLM open them too. Calling it again does nothing.
    """
    AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        auto.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
