"""ChatGLM-6B's tokenizer: text to ids and back, exactly as published. No torch.

An id sequence is the text's pieces followed by [gMASK] <sop>: the model fills the gap that [gMASK]
marks, beginning after <sop>. Blanks, tabs and newlines have pieces of their own, because
sentencepiece's normalisation would lose them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from glmui.prompts import chatglm_prompt, chatglm_rounds
from glmui.text.model_files import ChatGLMFamily
from glmui.text.vocabulary import (
    CHATGLM_PLACES,
    EOP,
    GMASK,
    NAMES,
    PAD,
    SOP,
    UNK,
    open_vocabulary,
    vocabulary_file,
)
from glmui.types import Message

VOCABULARY = NAMES["chatglm"]

# Typed into a text, these five become special ids; "[gMASK]" and all others are ordinary text.
_TYPED = re.compile(r"(<sop>|<eop>|<unk>|<pad>|\[MASK\])")
_BLANKS = re.compile(r" {2,80}")
_BLANK_PIECE = re.compile(r"<\|blank_([2-9]|[1-7]\d|80)\|>")

# What transformers calls clean_up_tokenization_spaces, in its order.
_CLEAN_UPS = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)


class ChatGLMTokenizer:
    """Opens a folder's (or file's) ice_text.model. Safe to use from several threads.

    Raises ModelError when the file is missing, unreadable, or another model's vocabulary.
    """

    family: ClassVar[ChatGLMFamily] = "chatglm"

    def __init__(self, path: Path | str) -> None:
        self.file = vocabulary_file(Path(path), "chatglm")
        self._pieces = open_vocabulary(self.file, "chatglm")

    def __len__(self) -> int:
        """Ids that have a piece (130344; the model's own vocabulary is padded to 130528)."""
        return int(self._pieces.get_piece_size())

    def encode(
        self,
        text: str,
        pair: str | None = None,
        *,
        literal: bool = False,
        special: bool = True,
        max_length: int | None = None,
    ) -> list[int]:
        """`text` + [gMASK] <sop>, and with a `pair` + that + <eop>.

        literal: a typed <sop>, <eop>, <unk>, <pad> or [MASK] stays plain text. special: append the
        special ids. max_length: cut the text on the right so that all ids together are at most so many.
        """
        ids, answer = self._text_ids(text, literal), []
        if pair is not None:
            answer = [*self._text_ids(pair, literal), EOP] if special else self._text_ids(pair, literal)
        ends = [GMASK, SOP] if special else []
        if max_length is not None:
            ids = ids[: max(max_length - len(ends) - len(answer), 0)]
        return [*ids, *ends, *answer]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`. Special ids and ids without a piece give nothing, each byte of a broken
        character gives U+FFFD; `skip_special_tokens` also drops <unk>'s " ⁇ "."""
        dropped = {PAD, UNK} if skip_special_tokens else {PAD}
        count = len(self)
        known = [i for i in ids if 0 <= i < count and i not in dropped]
        return clean_up(restore_blanks(self._pieces.decode(known)))

    def piece(self, token: int) -> str | None:
        """One id's piece as the vocabulary has it ("▁", "你好", "<0xE4>"), "" for special ids, " ⁇ " for
        <unk>, and None for the ids that decoding leaves out."""
        if not 0 <= token < len(self) or token == PAD:
            return None
        if self._pieces.is_control(token):
            return ""
        return " \u2047 " if token == UNK else self.name(token)

    def name(self, token: int) -> str:
        """Any id's name in the vocabulary, special ones included; "" where it has none."""
        return str(self._pieces.id_to_piece(token)) if 0 <= token < len(self) else ""

    def id(self, name: str) -> int:
        """The id of a piece by its name, <unk>'s where there is none such."""
        return int(self._pieces.piece_to_id(name))

    def byte(self, token: int) -> int | None:
        """The byte that a byte piece stands for, None for any other id."""
        if not 0 <= token < len(self) or not self._pieces.is_byte(token):
            return None
        return int(self.name(token)[3:5], 16)

    def _text_ids(self, text: str, literal: bool) -> list[int]:
        if literal:
            return self._plain_ids(text)
        parts = _TYPED.split(text)  # plain, special, plain, special, …, plain
        ids: list[int] = []
        for place, part in enumerate(parts):
            if place % 2:
                ids.append(CHATGLM_PLACES[part])
                continue
            if place > 0:
                part = part.lstrip()
            if place < len(parts) - 1:
                part = part.rstrip()
            ids += self._plain_ids(part)
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        if not text:
            return []
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair becomes "?"
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = _BLANKS.sub(lambda run: f"<|blank_{len(run[0])}|>", text)
        return list(self._pieces.encode(text))


def restore_blanks(text: str) -> str:
    """The pieces of newline, tab and runs of blanks, as what they stand for."""
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    return _BLANK_PIECE.sub(lambda piece: " " * int(piece[1]), text)


def clean_up(text: str) -> str:
    """Drop the blank before English marks and endings, as decoding does by default ("a !b" → "a!b")."""
    for before, after in _CLEAN_UPS:
        text = text.replace(before, after)
    return text


def prompt_ids(tokenizer: ChatGLMTokenizer, messages: Sequence[Message]) -> list[int]:
    """What the model sees of a conversation; special tokens typed by the user are plain text here.

    Where the last message is the assistant's, its text stands after <sop>, so that the model goes on with it.
    """
    ids = tokenizer.encode(chatglm_prompt(*chatglm_rounds(messages)), literal=True)
    return ids + tokenizer.encode(begun_reply(messages), literal=True, special=False)


def begun_reply(messages: Sequence[Message]) -> str:
    """The reply to be continued, "" where a new one is asked for."""
    return messages[-1].content if messages and messages[-1].role == "assistant" else ""
