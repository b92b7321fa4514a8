"""ChatGLM-6B's replies: ids to the text a reader sees, whole or as a stream.

Published code decodes everything again at each step, so text can change behind the cursor. Here a
stream of small stages each keeps back only the end that what follows could still change (a broken
character, a blank before a mark, a mark before a Chinese character). What came out never changes,
all of it together equals `reply_text` of all ids, and the cost is linear.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from glmui.text import stages
from glmui.text.chatglm import ChatGLMTokenizer, clean_up, restore_blanks
from glmui.text.stages import Characters, Rewrite, Stage, Strip, fill_training_time, training_time

_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_BESIDE_CHINESE = [
    (re.compile(pattern % re.escape(mark)), replacement % wide)
    for mark, wide in _FULL_WIDTH.items()
    for pattern, replacement in (("([\u4e00-\u9fff])%s", r"\1%s"), ("%s([\u4e00-\u9fff])", r"%s\1"))
]


def widen_marks(text: str) -> str:
    """Make , ! : ; ? full width where they touch a Chinese character."""
    for pattern, replacement in _BESIDE_CHINESE:
        text = pattern.sub(replacement, text)
    return text


def process_response(text: str) -> str:
    """What the published chat() does to a decoded reply before it is shown or kept in the history."""
    return widen_marks(fill_training_time(text.strip()))


def reply_text(tokenizer: ChatGLMTokenizer, ids: Sequence[int]) -> str:
    """The reply that `ids` are."""
    return process_response(tokenizer.decode(ids))


class ChatGLMDetokeniser:
    """Feed ids one by one; get the reply's text piece by piece, whole characters only.

    before: the text that this reply goes on with, "" for a new one.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, before: str = "") -> None:
        self._characters = Characters(tokenizer, begun=bool(before))
        self._stages: tuple[Stage, ...] = (
            Rewrite(r"<(?:n|\|(?:t|ta|tab|b\w{0,8})?\|?)?", restore_blanks),
            Rewrite(r" {1,3}(?:n? ?'[ 'nvr]*|n? ?|[vr])", clean_up),
            Strip(begun=bool(before)),
            training_time(),
            Rewrite(r"[,!:;?]", widen_marks, left=before[-1:]),
        )

    def add(self, token: int) -> str:
        """What this id lets out: "" while it is undecided."""
        return stages.run(self._stages, self._characters.add(token))

    def finish(self) -> str:
        """What was still kept back."""
        return stages.finish(self._stages, self._characters.finish())
