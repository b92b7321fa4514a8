"""Chatting in the terminal, with engines that say what they are told to."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from glmui import i18n
from glmui.engine import client
from glmui.errors import EngineError, InvalidInput
from glmui.hub import starter
from glmui.prompts import Limits
from glmui.settings import Settings
from glmui.tools.chat import Chat, Terminal, Wish, answer_once, converse, find_model, run
from glmui.types import Chunk, EngineInfo, GenerationParams, Message, Progress, Usage
from tests.small_world import echo_with_room


class Repeater:
    """Answers with what it was asked, word by word; `between` is called before each word."""

    def __init__(self, between: Callable[[], None] = lambda: None) -> None:
        self.asked: list[list[Message]] = []
        self.room = 0
        self.between = between
        self.cancelled = threading.Event()

    def info(self) -> EngineInfo:
        return EngineInfo(context_room=self.room)

    def stream_chat(
        self, messages: Sequence[Message], params: GenerationParams, request_id: str
    ) -> Iterator[Chunk]:
        self.asked.append(list(messages))
        self.cancelled.clear()
        yield Chunk(progress=Progress("loading", 0.5))
        words = messages[-1].content.split()
        if words == ["fail"]:
            raise EngineError("internal", detail="on purpose")
        for number, word in enumerate(words):
            self.between()
            if self.cancelled.is_set():
                yield Chunk(finish_reason="cancelled")
                return
            yield Chunk(text=f"{word} ", tokens=number + 1)
        yield Chunk(finish_reason="stop", usage=Usage(7, len(words), 1.23456, 0.5))

    def cancel(self, request_id: str) -> None:
        self.cancelled.set()

    def unload(self) -> None:
        pass


def count(messages: Sequence[Message]) -> int:
    return sum(len(message.content.split()) for message in messages)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def chat_with(engine: Repeater, system: str = "", max_length: int = 2048) -> Chat:
    return Chat(
        engine, count, lambda: Limits(0, engine.room), GenerationParams(max_length=max_length), system
    )


def typed(*lines: str) -> Callable[[str], str]:
    waiting = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    return read


def test_a_reply_is_streamed_as_plain_text() -> None:
    out, err = io.StringIO(), io.StringIO()
    answer_once(chat_with(Repeater()), "one two", Terminal("en", out, err))
    assert out.getvalue() == "one two \n"
    assert err.getvalue() == ""


def test_progress_is_shown_where_someone_looks_and_wiped_before_the_text() -> None:
    screen = Screen()
    answer_once(chat_with(Repeater()), "one", Terminal("zh", screen, screen))
    shown = "正在载入模型 50%"
    assert screen.getvalue() == f"{shown}\r{' ' * (12 + 4)}\rone \n"


def test_json_is_one_object() -> None:
    out = io.StringIO()
    answer_once(chat_with(Repeater()), "法国 首都", Terminal("en", out, io.StringIO()), as_json=True)
    assert json.loads(out.getvalue()) == {
        "response": "法国 首都 ",
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "seconds": 1.235,
        "finish_reason": "stop",
    }
    assert "法国" in out.getvalue()


def test_a_conversation_is_remembered_until_clear() -> None:
    engine, out = Repeater(), io.StringIO()
    converse(
        chat_with(engine, system="be kind"),
        Terminal("en", out),
        typed("a", " ", "b", "clear", "c", "stop", "d"),
    )
    assert [[message.content for message in asked] for asked in engine.asked] == [
        ["be kind", "a"],
        ["be kind", "a", "a ", "b"],
        ["be kind", "c"],
    ]
    assert "Forgotten" in out.getvalue()


def test_old_rounds_make_room() -> None:
    engine = Repeater()
    long = "word " * 30
    converse(chat_with(engine, max_length=64), Terminal("en", io.StringIO()), typed(long, long, "last"))
    assert [len(asked) for asked in engine.asked] == [1, 1, 1]


def test_old_rounds_make_room_where_memory_has_none_and_it_is_said() -> None:
    engine, out = Repeater(), io.StringIO()
    engine.room = 100
    converse(chat_with(engine), Terminal("en", out), typed("a " * 20, "b " * 20, "stop"))
    assert [message.content.split()[0] for message in engine.asked[1]] == ["b"]
    assert "the oldest round was left out" in out.getvalue()


def test_what_goes_wrong_ends_the_round_alone() -> None:
    engine, out = Repeater(), io.StringIO()
    converse(chat_with(engine, max_length=64), Terminal("en", out), typed("fail", "word " * 100, "fine"))
    assert "on purpose" in out.getvalue()
    assert "only 63 fit" in out.getvalue()
    assert out.getvalue().endswith("fine \n")
    assert [message.content for message in engine.asked[-1]] == ["fine"]


def test_what_broke_a_reply_is_said_on_a_line_of_its_own() -> None:
    def between() -> None:
        if "half" in out.getvalue():
            raise EngineError("internal", detail="on purpose")

    out = io.StringIO()
    converse(chat_with(Repeater(between)), Terminal("en", out), typed("half a reply"))
    last, said = out.getvalue().splitlines()[-2:]
    assert last == "half "
    assert "on purpose" in said


def test_one_prompt_that_is_too_long_is_an_error() -> None:
    with pytest.raises(InvalidInput):
        answer_once(chat_with(Repeater(), max_length=64), "word " * 100, Terminal("en", io.StringIO()))


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to itself")
def test_ctrl_c_stops_the_reply_and_keeps_it() -> None:
    out = io.StringIO()
    words = 0

    def between() -> None:
        nonlocal words
        words += 1
        if words == 3:
            signal.raise_signal(signal.SIGINT)
            assert engine.cancelled.wait(5)

    engine = Repeater(between)
    before = signal.getsignal(signal.SIGINT)
    converse(chat_with(engine), Terminal("en", out), typed("one two three four", "next"))
    assert signal.getsignal(signal.SIGINT) is before
    assert "one two \nnext \n" in out.getvalue()
    assert [message.content for message in engine.asked[1]] == ["one two three four", "one two ", "next"]


def test_naming_the_starter_fetches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def fetch(data_dir: Path, on_progress: object, cancelled: Callable[[], bool]) -> Path:
        asked.append(data_dir)
        return data_dir / "starter"

    monkeypatch.setattr(starter, "ensure_starter", fetch)
    assert find_model("starter", tmp_path, lambda _: None) == tmp_path / "starter"
    assert find_model("echo", tmp_path, lambda _: None) == Path("echo")
    assert asked == [tmp_path]


class Wakes(Repeater):
    """Has room for so many tokens, which nobody knows before it is asked."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._has = room

    def stream_chat(
        self, messages: Sequence[Message], params: GenerationParams, request_id: str
    ) -> Iterator[Chunk]:
        self.room = self._has
        if (tokens := count(messages)) >= self.room:
            raise InvalidInput("prompt_beyond_memory", tokens=tokens, room=self.room)
        yield from super().stream_chat(messages, params, request_id)


def test_the_prompt_is_cut_anew_where_memory_turns_out_to_have_less_room() -> None:
    engine, out = Wakes(100), io.StringIO()
    chat = chat_with(engine)
    chat._said = [Message("user", "old " * 90), Message("assistant", "old " * 90)]
    assert answer_once(chat, "new", Terminal("en", out)).finish_reason == "stop"
    assert out.getvalue() == "new \n"
    with pytest.raises(InvalidInput, match="memory has room for only 100"):
        answer_once(chat, "much " * 200, Terminal("en", out))


def out_of_memory_after(words: int) -> Repeater:
    left = [words]

    def between() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise EngineError("memory_kept.context", tokens=512)

    return Repeater(between)


def test_json_keeps_what_was_written_before_memory_ran_out_and_tells_of_it() -> None:
    out = io.StringIO()
    with pytest.raises(EngineError):
        answer_once(chat_with(out_of_memory_after(2)), "one two three", Terminal("en", out), as_json=True)
    answer = json.loads(out.getvalue())
    assert (answer["response"], answer["finish_reason"]) == ("one two ", "error")
    assert answer["completion_tokens"] == 2
    assert answer["error"]["code"] == "memory_broke_off.alone"
    assert "--max-length" in answer["error"]["message"]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", ["pieces", "context", "layers", "reserve", "cpu"])
def test_the_terminal_promises_no_continue(kind: str, language: str) -> None:
    def between() -> None:
        raise EngineError(f"memory_kept.{kind}", tokens=123, layers=123, gb=123)

    out = io.StringIO()
    converse(chat_with(Repeater(between)), Terminal(language, out), typed("hello"))
    said = out.getvalue()
    assert i18n.text(language, "chat.continue") not in said
    assert "memory_" not in said
    assert ("123" in said) == (kind != "cpu")


def test_the_first_prompt_knows_the_room_there_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine of so little memory that the message has no room: it is said before anything is loaded."""
    started: list[object] = []
    monkeypatch.setattr(client, "EngineProcess", started.append)
    wish = Wish(echo_with_room(1000).model, "word " * 600, GenerationParams())
    with pytest.raises(InvalidInput, match="memory has room for only"):
        run(wish, Settings(data_dir=tmp_path, device="cuda"), "en")
    assert started == []
