"""The scripted engine does what it is told, in the form that every engine has."""

from __future__ import annotations

import threading

import pytest

from glmui.engine.echo import EchoEngine
from glmui.errors import EngineError, InvalidInput
from glmui.text import open_counter
from glmui.types import Chunk, EngineSpec, GenerationParams, Message

PARAMS = GenerationParams()


def ask(text: str, params: GenerationParams = PARAMS, engine: EchoEngine | None = None) -> list[Chunk]:
    return list((engine or EchoEngine()).stream_chat([Message("user", text)], params, "request"))


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_says_back_what_it_was_told() -> None:
    chunks = ask("你好 there")
    assert text_of(chunks) == "You said: 你好 there"
    assert chunks[-1].finish_reason == "stop"
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == len([chunk for chunk in chunks if chunk.text])
    assert usage.prompt_tokens == open_counter("echo")([Message("user", "你好 there")])  # type: ignore[arg-type]


def test_answers_the_last_message() -> None:
    messages = [Message("user", "one"), Message("assistant", "1"), Message("user", "two")]
    assert "two" in text_of(list(EchoEngine().stream_chat(messages, PARAMS, "request")))


def test_so_many_tokens() -> None:
    chunks = ask("/echo tokens=500")
    assert chunks[-1].tokens == 500
    assert chunks[-1].finish_reason == "stop"


def test_so_fast() -> None:
    usage = ask("/echo tokens=11 speed=100")[-1].usage
    assert usage is not None
    assert usage.decode_seconds >= 0.09
    assert usage.tokens_per_second <= 111


@pytest.mark.parametrize(
    "params", [GenerationParams(max_length=64), GenerationParams(max_new_tokens=40)], ids=["length", "new"]
)
def test_bounded(params: GenerationParams) -> None:
    chunks = ask("/echo tokens=500", params)
    assert chunks[-1].finish_reason == "length"
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == params.max_new_tokens or (
        usage.prompt_tokens + usage.completion_tokens == params.max_length
    )


def test_a_prompt_too_long() -> None:
    with pytest.raises(InvalidInput):
        ask("word " * 100, GenerationParams(max_length=64))


@pytest.mark.parametrize(
    ("trouble", "code"), [("error", "engine_failed"), ("oom", "out_of_memory"), ("crash", "engine_died")]
)
def test_trouble_comes_after_some_text(trouble: str, code: str) -> None:
    seen: list[Chunk] = []
    stream = EchoEngine().stream_chat([Message("user", f"/echo {trouble}")], PARAMS, "request")
    with pytest.raises(EngineError) as raised:
        seen.extend(stream)
    assert raised.value.code == code
    assert text_of(seen)


@pytest.mark.parametrize("script", ["hang", "tokens=100000 speed=50", "prefill=60", "load=60"])
def test_stop_is_heard_at_once(script: str) -> None:
    engine, begun = EchoEngine(), threading.Event()

    def stop() -> None:
        begun.wait(5)
        engine.cancel("request")

    stopper = threading.Thread(target=stop)
    stopper.start()
    chunks = []
    for chunk in engine.stream_chat([Message("user", f"/echo {script}")], PARAMS, "request"):
        chunks.append(chunk)
        begun.set()
    stopper.join()
    assert chunks[-1].finish_reason == "cancelled"
    assert chunks[-1].usage is not None


def test_a_cancel_for_another_request_does_nothing() -> None:
    engine = EchoEngine()
    engine.cancel("another")
    assert ask("hello", engine=engine)[-1].finish_reason == "stop"


def test_loads_at_the_first_message_and_again_after_unload() -> None:
    engine = EchoEngine()

    def stages() -> list[str]:
        return [chunk.progress.stage for chunk in ask("hello", engine=engine) if chunk.progress]

    assert engine.info().state == "asleep"
    assert stages() == ["loading", "prefill"]
    assert engine.info().state == "ready"
    assert stages() == ["prefill"]
    engine.unload()
    assert stages() == ["loading", "prefill"]


def test_the_loop_note_is_a_setting() -> None:
    assert ask("/echo repeat")[-1].note == "repetition"
    quiet = EchoEngine(EngineSpec("echo", "echo", stop_repetition=False))
    assert ask("/echo repeat", engine=quiet)[-1].note == ""


def test_dangerous_and_rich_text() -> None:
    assert "<script>" in text_of(ask("/echo script"))
    rich = text_of(ask("/echo markdown"))
    assert all(sign in rich for sign in ("```python", "| left |", "$e^", "\\(a^2\\)", "\\[", "$$"))


def test_where_memory_is_what_lacks_room_it_is_memory_that_is_named() -> None:
    echo = EchoEngine(EngineSpec("echo", "echo", context_most=100))
    with pytest.raises(InvalidInput) as caught:
        list(echo.stream_chat([Message("user", "word " * 100)], GenerationParams(), "r"))
    assert (caught.value.code, caught.value.values["room"]) == ("prompt_beyond_memory", 100)
    with pytest.raises(InvalidInput) as caught:
        list(echo.stream_chat([Message("user", "word " * 100)], GenerationParams(max_length=64), "r"))
    assert caught.value.code == "prompt_too_long"
