"""How chat() and stream_chat() of each model ask and answer: prompts, histories, replies."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, cast

import torch

from glmui import notes, prompts
from glmui.engine.sampling import Sampler, blank_where_broken, make_generator
from glmui.text import chatglm2, chatglms
from glmui.text.chatglm import ChatGLMTokenizer
from glmui.text.chatglm2 import ChatGLM2Tokenizer
from glmui.text.chatglm3 import ASSISTANT, STOPS, ChatGLM3Tokenizer, Turn, chat_ids, read_reply
from glmui.text.chatglm_reply import reply_text
from glmui.types import GenerationParams, Message, Role

_BLANK = 5  # the id that the published codes answer with where logits are broken
_BROKEN = "\ufffd"


@dataclass(frozen=True, slots=True)
class Wish:
    """How chat() and stream_chat() are to answer; their keyword arguments by the same names.

    max_length: tokens of prompt and reply together. do_sample False or temperature 0: greedy. top_k: 50 is
    what the published code does without saying so; 0 is off. seed: None draws from torch's own generator.
    published: do exactly what the published code does, its oddities included. These are ChatGLM-6B's
    defaults; a Talk has those of its model.
    """

    max_length: int = 2048
    do_sample: bool = True
    top_p: float = 0.7
    temperature: float = 0.95
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int | None = None
    published: bool = False

    def sampler(self, device: torch.device) -> Sampler:
        """Raises InvalidInput for values out of bounds (ValueError for the published temperature rule)."""
        if self.published and self.do_sample:
            _check_published_temperature(self.temperature)
        params = GenerationParams(
            temperature=self.temperature if self.do_sample else 0,
            top_p=min(self.top_p, 1.0),
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
        )
        generator = None if self.seed is None else make_generator(self.seed, device)
        if self.published:
            return Sampler(params, generator, mend=partial(blank_where_broken, blank_id=_BLANK))
        return Sampler(params, generator)


def _check_published_temperature(value: float) -> None:
    if value != 1 and (not isinstance(value, float) or value <= 0):
        raise ValueError(f"temperature must be a float above 0, not {value!r}")


@dataclass(frozen=True, slots=True)
class Asked:
    """One question. history: what came before, in the model's own form, and the question too where that is a
    list of messages. ids: the prompt."""

    query: str
    history: list[Any]
    ids: list[int]


Answer = tuple[Any, list[Any]]  # the response, and the history with it


class Talk(Protocol):
    """A model's way. The tokenizer is the model's own."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Of Wish, where they are others."""
        ...

    def ask(self, tokenizer: Any, query: str, history: Any, role: Role, wish: Wish) -> Asked:
        """Raises InvalidInput("prompt_too_long") where the question alone is (not when published)."""
        ...

    def answer(self, tokenizer: Any, asked: Asked, ids: Sequence[int], wish: Wish) -> Answer:
        """What chat() returns for the new `ids`."""
        ...

    def so_far(self, asked: Asked, response: str) -> list[Any]:
        """The history with a reply that is still growing."""
        ...

    def published_stream(self, tokenizer: Any, asked: Asked, ids: Iterator[int]) -> Iterator[Answer]:
        """What the published stream_chat() yields, everything decoded anew for each id."""
        ...


class ChatGLMTalk:
    """ChatGLM-6B: history is a list of (question, answer)."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    prompt = staticmethod(prompts.chatglm_prompt)

    def ask(self, tokenizer: Any, query: str, history: Any, role: Role, wish: Wish) -> Asked:
        rounds = [(str(question), str(answer)) for question, answer in history or []]
        if wish.published:
            return Asked(query, rounds, tokenizer.encode(self.prompt(rounds, query)))
        said = [m for q, a in rounds for m in (Message("user", q), Message("assistant", a))]
        ids = fitting([*said, Message("user", query)], partial(chatglms.prompt_ids, tokenizer), wish)
        return Asked(query, rounds, ids)

    def answer(self, tokenizer: Any, asked: Asked, ids: Sequence[int], wish: Wish) -> Answer:
        response = self.text(tokenizer, ids)
        return response, self.so_far(asked, response)

    def so_far(self, asked: Asked, response: str) -> list[Any]:
        return [*asked.history, (asked.query, response)]

    def text(self, tokenizer: Any, ids: Sequence[int]) -> str:
        return reply_text(cast(ChatGLMTokenizer, tokenizer), ids)

    def published_stream(self, tokenizer: Any, asked: Asked, ids: Iterator[int]) -> Iterator[Answer]:
        """After each id but the last, whatever that is."""
        new: list[int] = []
        for token in ids:
            if new:
                yield self.answer(tokenizer, asked, new, Wish())
            new.append(token)


class ChatGLM2Talk(ChatGLMTalk):
    """ChatGLM2: the same with a template of its own, and fewer changes to a reply."""

    defaults: ClassVar[Mapping[str, Any]] = {"max_length": 8192, "top_p": 0.8, "temperature": 0.8}
    prompt = staticmethod(prompts.chatglm2_prompt)

    def text(self, tokenizer: Any, ids: Sequence[int]) -> str:
        return chatglm2.process_response(cast(ChatGLM2Tokenizer, tokenizer).decode(ids))

    def published_stream(self, tokenizer: Any, asked: Asked, ids: Iterator[int]) -> Iterator[Answer]:
        """After each id, unless there is no text yet or a character is unfinished."""
        new: list[int] = []
        for token in ids:
            new.append(token)
            if is_shown(tokenizer.decode(new)):
                yield self.answer(tokenizer, asked, new, Wish())


class ChatGLM3Talk:
    """ChatGLM3: history is a list of {"role", "content", "metadata", "tools"}, and a response may be a dict,
    {"name", "parameters"} or {"name", "content"}: the call of a tool."""

    def __init__(self, context_length: int = 8192) -> None:
        self.defaults: Mapping[str, Any] = {"max_length": context_length, "top_p": 0.8, "temperature": 0.8}

    def ask(self, tokenizer: Any, query: str, history: Any, role: Role, wish: Wish) -> Asked:
        """Published, the question is put into the caller's own list."""
        items = [] if history is None else history if wish.published else list(history)
        turns = [*map(Turn.of, items), Turn(role, query)]
        prompt = partial(chat_ids, cast(ChatGLM3Tokenizer, tokenizer))
        ids = prompt(turns) if wish.published else fitting(turns, prompt, wish)
        items.append({"role": role, "content": query})
        return Asked(query, items, ids)

    def answer(self, tokenizer: Any, asked: Asked, ids: Sequence[int], wish: Wish) -> Answer:
        if wish.published:
            ids = ids[:-1]  # whatever it is
        else:
            ids = [i for i in ids if i not in STOPS and (i == ASSISTANT or i not in tokenizer.special)]
        return self._read(asked, tokenizer.decode(ids), wish.published)

    def so_far(self, asked: Asked, response: str) -> list[Any]:
        said = {"role": "assistant", "metadata": "", "content": response}
        return [*copy.deepcopy(asked.history), said]

    def _read(self, asked: Asked, output: str, published: bool) -> Answer:
        first = asked.history[0]
        tools = first["role"] == "system" and "tools" in first
        response, turns = read_reply(output, tools, strict=published)
        said = [{"role": "assistant", "metadata": turn.metadata, "content": turn.content} for turn in turns]
        shown = response if isinstance(response, str) else response.to_dict()
        return shown, [*copy.deepcopy(asked.history), *said]

    def published_stream(self, tokenizer: Any, asked: Asked, ids: Iterator[int]) -> Iterator[Answer]:
        """One id late, the last one never, unless there is no text yet or a character is unfinished."""
        new: list[int] = []
        for token in ids:
            if is_shown(output := tokenizer.decode(new)):
                yield self._read(asked, output, published=True)
            new.append(token)


def is_shown(output: str) -> bool:
    """Whether the published streams of ChatGLM2 and 3 yield this."""
    return bool(output) and not output.endswith(_BROKEN)


def fitting(
    messages: Sequence[Message], prompt_ids: Callable[[Sequence[Message]], list[int]], wish: Wish
) -> list[int]:
    """The prompt of as many rounds as leave room for a reply, with a warning where some are left out."""
    budget = max(1, int(wish.max_length * (1 - prompts.REPLY_SHARE)))
    kept = prompts.fit(messages, lambda m: len(prompt_ids(m)), budget, hard_limit=wish.max_length - 1)
    for words in notes.words(notes.left_out(kept.left_out), "en"):
        warnings.warn(words, stacklevel=5)
    return prompt_ids(kept.messages)


def talk_of(tokenizer: Any, context_length: int) -> Talk:
    """The way of the model that this tokenizer belongs to."""
    if isinstance(tokenizer, ChatGLM3Tokenizer):
        return ChatGLM3Talk(context_length)
    return ChatGLM2Talk() if isinstance(tokenizer, ChatGLM2Tokenizer) else ChatGLMTalk()
