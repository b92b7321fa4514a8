"""ChatGLM3-6B's tokenizer, prompt and replies, exactly as published. No torch.

A conversation is a row of messages, each a role's id, a line that is empty or names a tool, and the content.
A reply is such a message without its role; several may follow one another.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from glmui.text.chatglm2 import EOS, GMASK, NAMES, SOP, ChatGLM2Detokeniser, ChatGLM2Tokenizer
from glmui.text.model_files import ChatGLMFamily
from glmui.text.stages import fill_training_time
from glmui.types import Message

SYSTEM, USER, ASSISTANT, OBSERVATION = range(64794, 64798)
ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "observation": OBSERVATION}
STOPS = frozenset((EOS, USER, OBSERVATION))

_MARKS = {token: f"<|{role}|>" for role, token in ROLES.items()}
_TYPED = re.compile("(" + "|".join(map(re.escape, _MARKS.values())) + ")")


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """The same vocabulary, with four roles behind its special ids."""

    family: ClassVar[ChatGLMFamily] = "chatglm3"
    special: ClassVar[dict[int, str]] = NAMES | _MARKS

    def text_ids(self, text: str, roles: bool = False) -> list[int]:
        """The pieces of one text. roles: a typed <|user|> … becomes its id (never in a conversation)."""
        if not roles:
            return super().text_ids(text)
        parts = _TYPED.split(text)  # text, role, text, role, …, text
        ids = [[self.id(part)] if place % 2 else self.text_ids(part) for place, part in enumerate(parts)]
        return [token for some in ids for token in some]

    def message_ids(self, role: str, content: str, metadata: str = "") -> list[int]:
        """One message. Raises ValueError for a role that the model does not know."""
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, not {role!r}")
        return [ROLES[role], *self.text_ids(f"{metadata}\n"), *self.text_ids(content)]

    def _shown(self, token: int) -> str:
        return self.special.get(token) or super()._shown(token)


@dataclass(frozen=True, slots=True)
class Turn(Message):
    """A message with what ChatGLM3's history may hold besides.

    metadata: the name of a tool that is called, "" otherwise. tools: offered by a system message, as the
    JSON values that the model is shown.
    """

    metadata: str = ""
    tools: Any = None

    @classmethod
    def of(cls, item: Mapping[str, Any]) -> Turn:
        """A history's item {"role", "content", "metadata", "tools"}."""
        return cls(item["role"], item["content"], item.get("metadata", ""), item.get("tools"))

    @property
    def told(self) -> str:
        """The content, and the tools where a system message offers them."""
        if self.role != "system" or self.tools is None:
            return self.content
        return f"{self.content}\n{json.dumps(self.tools, indent=4, ensure_ascii=False)}"


def chat_ids(tokenizer: ChatGLM3Tokenizer, messages: Iterable[Message]) -> list[int]:
    """What the model sees of a conversation before its next reply."""
    turns = [m if isinstance(m, Turn) else Turn(m.role, m.content) for m in messages]
    said = [token for t in turns for token in tokenizer.message_ids(t.role, t.told, t.metadata)]
    return [GMASK, SOP, *said, ASSISTANT]


def prompt_ids(tokenizer: ChatGLM3Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The same; a last message of the assistant is one to go on from."""
    ids = chat_ids(tokenizer, messages)
    return ids[:-1] if messages and messages[-1].role == "assistant" else ids


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What a reply asks for. parameters: None where no tools were offered, or they cannot be read."""

    name: str
    content: str
    parameters: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As chat() returns it."""
        if self.parameters is None:
            return {"name": self.name, "content": self.content}
        return {"name": self.name, "parameters": self.parameters}


def read_reply(output: str, tools: bool, strict: bool = False) -> tuple[str | ToolCall, list[Turn]]:
    """A decoded reply as (what is returned, the history's new turns).

    The last message counts; one whose first line names a tool is a ToolCall. tools: whether any were
    offered, so that the call is read. strict: raise SyntaxError where it cannot be, as published.
    """
    response: str | ToolCall = ""
    turns = []
    for part in output.split(_MARKS[ASSISTANT]):
        metadata, newline, content = part.partition("\n")
        if not newline:
            metadata, content = "", part
        if not metadata.strip():
            content = content.strip()
            response = fill_training_time(content)
        else:
            response = _tool_call(metadata.strip(), content, tools, strict)
        turns.append(Turn("assistant", content, metadata))
    return response, turns


def _tool_call(name: str, content: str, tools: bool, strict: bool) -> ToolCall:
    if not tools:
        return ToolCall(name, content)
    try:
        return ToolCall(name, content, tool_parameters("\n".join(content.split("\n")[1:-1])))
    except SyntaxError:
        if strict:
            raise
        return ToolCall(name, content)


def tool_parameters(code: str) -> dict[str, Any]:
    """The parameters of "tool_call(city='北京', days=3)": literals by keyword. Nothing is evaluated.

    Raises SyntaxError for anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes that mean nothing
            call = ast.parse(code.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args):
            raise SyntaxError("no call with keywords")
        if call.func.id != "tool_call" or any(keyword.arg is None for keyword in call.keywords):
            raise SyntaxError("no plain tool_call")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        raise SyntaxError(str(error)) from error


class ChatGLM3Detokeniser(ChatGLM2Detokeniser):
    """The reply as a reader sees it: a second message begins a line, names of special ids are left out.

    A call of a tool stays as the model writes it, its name first.
    """

    def __init__(self, tokenizer: ChatGLM3Tokenizer, before: str = "") -> None:
        super().__init__(_Readable(tokenizer), before)


class _Readable:
    """The tokenizer's pieces, with a new line for <|assistant|>."""

    def __init__(self, tokenizer: ChatGLM3Tokenizer) -> None:
        self._tokenizer = tokenizer

    def piece(self, token: int) -> str | None:
        return "\n" if token == ASSISTANT else self._tokenizer.piece(token)

    def byte(self, token: int) -> int | None:
        return self._tokenizer.byte(token)
