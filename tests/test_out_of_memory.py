"""Memory that runs out inside the model, in real engine processes with a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from glmui.engine import process
from glmui.engine.client import EngineClient
from glmui.errors import EngineError
from glmui.types import Chunk, EngineSpec, GenerationParams, Message
from tests import failing_engine

GREEDY = GenerationParams(max_length=256, max_new_tokens=24, temperature=0)
LONG = [Message("user", "今天天气真不错" * 8)]
SHORT = [Message("user", "你好")]

Open = Callable[[str], EngineClient]


@pytest.fixture
def opened(tiny_chatglm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """A client whose processes fail as the name of its model says."""
    monkeypatch.setattr(process, "worker", SimpleNamespace(run=failing_engine.run))
    clients: list[EngineClient] = []

    def open_client(fails: str) -> EngineClient:
        clients.append(EngineClient(EngineSpec(fails, str(tiny_chatglm("int4")), threads=1), idle_seconds=0))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close()


def ask(client: EngineClient, messages: list[Message], into: list[Chunk], request: str = "1") -> str:
    """How the reply ended; its chunks go `into`."""
    into.extend(client.stream_chat(messages, GREEDY, request))
    return into[-1].finish_reason or ""


@pytest.mark.parametrize("stage", ["load", pytest.param("prefill", marks=pytest.mark.slow)])
def test_before_any_text_the_reply_begins_anew_with_less(opened: Open, stage: str) -> None:
    client, chunks = opened(stage), list[Chunk]()
    assert ask(client, LONG, chunks) == "length"
    assert "".join(chunk.text for chunk in chunks)
    assert "memory_" in chunks[-1].note  # what was changed is told under the reply
    assert client.info().reason.startswith("reasons.memory_")


def test_text_that_is_there_is_kept_and_the_next_request_works(opened: Open) -> None:
    client, chunks, after = opened("decode"), list[Chunk](), list[Chunk]()
    with pytest.raises(EngineError) as caught:
        ask(client, LONG, chunks)
    assert caught.value.code.startswith("memory_kept.")
    assert "".join(chunk.text for chunk in chunks)
    assert ask(client, LONG, after, "2") == "length"


@pytest.mark.slow
def test_twenty_in_a_row(opened: Open) -> None:
    """All the way down the ladder and on at its foot; a reply that fits is written as ever."""
    client, codes = opened("decode always"), []
    for number in range(20):
        with pytest.raises(EngineError) as caught:
            ask(client, LONG, [], str(number))
        codes.append(caught.value.code.partition(".")[0])
    assert set(codes) == {"memory_kept", "out_of_memory"}
    assert ask(client, SHORT, []) == "length"
