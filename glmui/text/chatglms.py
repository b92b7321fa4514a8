"""The three models' ways with text, by family: the one place that knows which tokenizer, prompt and reply
belong together. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from glmui.errors import ModelError
from glmui.text import chatglm, chatglm2, chatglm3
from glmui.text.chatglm import ChatGLMTokenizer
from glmui.text.chatglm2 import ChatGLM2Detokeniser, ChatGLM2Tokenizer
from glmui.text.chatglm3 import ChatGLM3Detokeniser, ChatGLM3Tokenizer
from glmui.text.chatglm_reply import ChatGLMDetokeniser
from glmui.text.model_files import ChatGLMFamily, chatglm_family, read_json
from glmui.text.vocabulary import EOP, MODELS, NAMES
from glmui.types import Message, TokenCounter

AnyTokenizer = ChatGLMTokenizer | ChatGLM2Tokenizer  # ChatGLM3's is one of ChatGLM2's


class Detokeniser(Protocol):
    def add(self, token: int) -> str: ...

    def finish(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Manner:
    """tokenizer: opens a folder. prompt_ids: of a tokenizer and a conversation. detokeniser: of a tokenizer
    and the reply that is gone on with, "" for a new one. stops: ids that end a reply."""

    tokenizer: Callable[[Path], Any]
    prompt_ids: Callable[[Any, Sequence[Message]], list[int]]
    detokeniser: Callable[[Any, str], Detokeniser]
    stops: frozenset[int]


_MANNERS: dict[ChatGLMFamily, Manner] = {
    "chatglm": Manner(ChatGLMTokenizer, chatglm.prompt_ids, ChatGLMDetokeniser, frozenset((EOP,))),
    "chatglm2": Manner(
        ChatGLM2Tokenizer, chatglm2.prompt_ids, ChatGLM2Detokeniser, frozenset((chatglm2.EOS,))
    ),
    "chatglm3": Manner(ChatGLM3Tokenizer, chatglm3.prompt_ids, ChatGLM3Detokeniser, chatglm3.STOPS),
}


def open_tokenizer(folder: Path, family: ChatGLMFamily, vocab_size: int) -> AnyTokenizer:
    """The tokenizer of a model with `vocab_size` ids. Raises ModelError, also when it has more of them."""
    tokenizer: AnyTokenizer = _MANNERS[family].tokenizer(folder)
    if len(tokenizer) > vocab_size:
        file = tokenizer.file
        raise ModelError("model_wrong_vocabulary", file=file, name=NAMES[family], model=MODELS[family])
    return tokenizer


def prompt_ids(tokenizer: AnyTokenizer, messages: Sequence[Message]) -> list[int]:
    """What the model sees of a conversation; a last message of the assistant is one to go on from."""
    return _MANNERS[tokenizer.family].prompt_ids(tokenizer, messages)


def detokeniser(tokenizer: AnyTokenizer, before: str = "") -> Detokeniser:
    """Makes the reply's text of its ids, whole characters only. before: the reply that is gone on with."""
    return _MANNERS[tokenizer.family].detokeniser(tokenizer, before)


def stops(family: ChatGLMFamily) -> frozenset[int]:
    """Ids that end a reply."""
    return _MANNERS[family].stops


def open_counter(folder: Path | str, family: str = "") -> TokenCounter:
    """A counter of prompt tokens. family: see model_files.chatglm_family. Raises ModelError."""
    folder = Path(folder)
    found = chatglm_family(folder, read_json(folder / "config.json"), family)
    tokenizer = _MANNERS[found].tokenizer(folder)
    return lambda messages: len(prompt_ids(tokenizer, messages))
