"""A transformers model folder's tokenizer and chat template, without torch and without transformers.

The template (Jinja) writes a conversation the way the model was trained to read it. It comes with the model,
so it runs in a sandbox. Control tokens written by the template count; those typed by a user are plain text.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from glmui.errors import InvalidInput, ModelError
from glmui.text.model_files import read_json, read_template
from glmui.types import Message


class ChatTokenizer:
    """Encodes conversations and decodes replies. Safe to use from several threads.

    eos_ids: ids that end a reply. special_ids: all control tokens; `decode` leaves them out.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str, special: dict[str, str], eos_ids: Iterable[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._render = _environment().from_string(template).render
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.eos_ids = frozenset(eos_ids)
        control = {added[i].content for i in self.special_ids}
        # A token that the template itself writes steers the model too, whether marked special or not.
        steering = control | {
            t.content for t in added.values() if t.content.strip() and t.content in template
        }
        self._control, self._steering = _starts(control), _starts(steering)

    def __len__(self) -> int:
        """Ids that have a token."""
        return int(self._tokenizer.get_vocab_size())

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTokenizer:
        """Open tokenizer.json and the chat template. Raises ModelError naming what is missing or broken."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError("model_file_missing", folder=folder, file="tokenizer.json")
        config = read_json(folder / "tokenizer_config.json")
        template = read_template(folder)
        if template is None:
            raise ModelError("model_no_chat_template", folder=folder)
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ModelError("model_file_broken", folder=folder, file="tokenizer.json") from error
        special = _special_tokens(read_json(folder / "special_tokens_map.json") | config)
        try:
            return cls(tokenizer, template, special, _eos_ids(folder, tokenizer, special))
        except jinja2.TemplateError as error:
            raise ModelError("model_file_broken", folder=folder, file="chat template") from error

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's ids, ready for the reply. A last message of the assistant is one to go on from.

        Raises InvalidInput("template_refused") when the template does not take such a conversation.
        """
        segments = self.render(messages).split(_mark_for(messages))
        return [i for segment in segments for i in self._encode(segment)]

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt (a TokenCounter)."""
        return len(self.encode_chat(messages))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt as text. A mark (an unused private character) stands in every typed control token."""
        mark = _mark_for(messages)
        turns = [{"role": m.role, "content": self._defused(m, mark)} for m in messages]
        goes_on = bool(messages) and messages[-1].role == "assistant"
        if goes_on:
            turns[-1]["content"] += mark * 2
        try:
            text = self._render(
                messages=turns, add_generation_prompt=not goes_on, **_OFFERED, **self._special
            )
        except jinja2.TemplateError as error:
            raise InvalidInput("template_refused", detail=str(error)) from error
        return text[: text.rindex(mark * 2)] if goes_on and mark * 2 in text else text

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def _defused(self, message: Message, mark: str) -> str:
        """The content with each typed control token broken in two, wherever one begins, overlapping too.

        In the model's own replies only special tokens are: others (</think> …) it may have written itself.
        """
        starts = self._control if message.role == "assistant" else self._steering
        places = [found.start() + 1 for found in starts.finditer(message.content)]
        ends = [0, *places, len(message.content)]
        return mark.join(message.content[a:b] for a, b in pairwise(ends))


_OFFERED: dict[str, Any] = {"tools": None, "documents": None}
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", …}; a token may be written as text or as {"content": text, …}."""
    found = {}
    for name in _NAMES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _eos_ids(folder: Path, tokenizer: Tokenizer, special: dict[str, str]) -> set[int]:
    ids: set[Any] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        ids |= set(value) if isinstance(value, list) else {value}
    ids.add(tokenizer.token_to_id(special.get("eos_token", "")))
    return {i for i in ids if isinstance(i, int)}


def _starts(tokens: set[str]) -> re.Pattern[str]:
    """Finds every place where one of `tokens` begins; one of a single character cannot be broken."""
    words = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)
    return re.compile(f"(?={'|'.join(map(re.escape, words))})" if words else "(?!)")


def _mark_for(messages: Sequence[Message]) -> str:
    """A private-use character that stands in no message."""
    used = set().union(*(m.content for m in messages)) if messages else set()
    return next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in used)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON as a model reads it: Jinja's own filter would escape for HTML."""
    options = {"ensure_ascii": False} | options
    return json.dumps(value, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationBlock(Extension):
    """{% generation %} marks the assistant's words for training; here they are just written."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way to name them)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
