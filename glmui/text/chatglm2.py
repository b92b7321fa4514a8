"""ChatGLM2-6B's tokenizer and prompt, exactly as published; ChatGLM3's (chatglm3.py) builds on it. No torch.

An id sequence is [gMASK] sop followed by the text's pieces: special ids stand in front here. Nothing that is
typed becomes a special id, and blanks, tabs and newlines survive by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from glmui.prompts import chatglm2_prompt, chatglm_rounds
from glmui.text import stages
from glmui.text.chatglm import begun_reply
from glmui.text.model_files import ChatGLMFamily
from glmui.text.stages import Characters, Pieces, Stage, Strip, fill_training_time, training_time
from glmui.text.vocabulary import CHATGLM2_PIECES, open_vocabulary, vocabulary_file
from glmui.types import Message

PAD, EOS = 0, 2
MASK, GMASK, SMASK, SOP, EOP = range(CHATGLM2_PIECES, CHATGLM2_PIECES + 5)
NAMES = {MASK: "[MASK]", GMASK: "[gMASK]", SMASK: "[sMASK]", SOP: "sop", EOP: "eop"}

_SILENT = (0, 1, 2)  # <unk>, <s> and </s> stand for no text


class ChatGLM2Tokenizer:
    """Opens a folder's (or file's) tokenizer.model. Safe to use from several threads.

    special: names by id of what stands behind the vocabulary's pieces.
    Raises ModelError when the file is missing, unreadable, or another model's vocabulary.
    """

    family: ClassVar[ChatGLMFamily] = "chatglm2"
    special: ClassVar[dict[int, str]] = NAMES

    def __init__(self, path: Path | str) -> None:
        self.file = vocabulary_file(Path(path), self.family)
        self._pieces = open_vocabulary(self.file, self.family)
        self._ids = {name: token for token, name in self.special.items()}

    def __len__(self) -> int:
        """Ids that mean something; the model's own vocabulary is padded to 65024."""
        return CHATGLM2_PIECES + len(self.special)

    def encode(
        self,
        text: str,
        pair: str | None = None,
        *,
        special: bool = True,
        max_length: int | None = None,
    ) -> list[int]:
        """[gMASK] sop + `text`, and with a `pair` + that + </s>.

        special: with the special ids. max_length: cut the text on the right so that all ids together are
        at most so many.
        """
        begin = [GMASK, SOP] if special else []
        ids, answer = self.text_ids(text), []
        if pair is not None:
            answer = [*self.text_ids(pair), EOS] if special else self.text_ids(pair)
        if max_length is not None:
            ids = ids[: max(max_length - len(begin) - len(answer), 0)]
        return [*begin, *ids, *answer]

    def text_ids(self, text: str) -> list[int]:
        """The pieces of one text, which begins with a blank of its own."""
        whole = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair becomes "?"
        return list(self._pieces.encode(whole))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`. Special ids give nothing here, and their names with ChatGLM3; ids without a
        meaning give nothing; each byte of a broken character gives U+FFFD. skip_special_tokens: changes
        nothing, as published."""
        return str(self._pieces.decode_pieces([self._shown(token) for token in ids]))

    def _shown(self, token: int) -> str:
        return self.piece(token) or ""

    def piece(self, token: int) -> str | None:
        """One id's piece as the vocabulary has it ("▁", "你好", "<0xE4>"), "" for special ids, and None
        for ids without a meaning."""
        if not 0 <= token < len(self):
            return None
        return "" if token in _SILENT or token in self.special else self.name(token)

    def name(self, token: int) -> str:
        """Any id's name, special ones included; "" where it has none."""
        if 0 <= token < CHATGLM2_PIECES:
            return str(self._pieces.id_to_piece(token))
        return self.special.get(token, "")

    def id(self, name: str) -> int:
        """The id of a piece or a special id by its name, <unk>'s where there is none such."""
        return self._ids[name] if name in self._ids else int(self._pieces.piece_to_id(name))

    def byte(self, token: int) -> int | None:
        """The byte that a byte piece stands for, None for any other id."""
        return token - 3 if 3 <= token <= 258 else None


def prompt_ids(tokenizer: ChatGLM2Tokenizer, messages: Sequence[Message]) -> list[int]:
    """What the model sees of a conversation; a last message of the assistant is one to go on from."""
    return tokenizer.encode(chatglm2_prompt(*chatglm_rounds(messages)) + begun_reply(messages))


def process_response(text: str) -> str:
    """What the published chat() does to a decoded reply before it is shown or kept in the history."""
    return fill_training_time(text.strip())


class ChatGLM2Detokeniser:
    """Feed ids one by one; get the reply's text piece by piece, whole characters only, never taken back.

    All of it together is process_response of the ids' text. before: the text that this reply goes on with.
    """

    def __init__(self, tokenizer: Pieces, before: str = "") -> None:
        self._characters = Characters(tokenizer, begun=bool(before))
        self._stages: tuple[Stage, ...] = (Strip(begun=bool(before)), training_time())

    def add(self, token: int) -> str:
        """What this id lets out: "" while it is undecided."""
        return stages.run(self._stages, self._characters.add(token))

    def finish(self) -> str:
        """What was still kept back."""
        return stages.finish(self._stages, self._characters.finish())
