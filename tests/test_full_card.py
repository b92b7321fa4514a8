"""A card that is full to its last byte: nothing may ask it for memory that does not have to."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch

from glmui.engine import device as devices
from glmui.engine import worker
from glmui.engine.client import EngineClient
from glmui.engine.families import open_family
from glmui.engine.placement import placement
from glmui.memory.plan_request import GIB
from glmui.memory.published import SHAPES
from glmui.types import EngineSpec, GenerationParams, Message

FULL = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
ASKED = [Message("user", "hello")]
SHORT = GenerationParams(max_new_tokens=3, temperature=0)
LOG = "GLMUI_TEST_TOUCHED"


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two cards, of which each call of torch's that needs a context tells here, and fails."""
    calls: list[str] = []

    def touch() -> None:
        calls.append("torch")
        raise torch.AcceleratorError(FULL)

    def free(card: int) -> tuple[int, int]:
        calls.append(f"cuda:{card}")
        raise torch.AcceleratorError(FULL)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "_lazy_init", touch)
    return calls


@pytest.mark.parametrize("family", ["chatglm", "causal_lm"])
def test_on_the_cpu_no_card_is_touched(
    touched: list[str], tiny_chatglm: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """The ladder's last rung must hold where it is needed: where not even a context fits on the card."""
    from tests.tiny_llama import make_tiny_llama  # with transformers, which the processes below need not load

    folder = tiny_chatglm("int4") if family == "chatglm" else make_tiny_llama(tmp_path)
    threads = torch.get_num_threads()
    engine = open_family(EngineSpec("tiny", str(folder), device="cpu"), lambda progress: None)
    *_, last = engine.stream_chat(ASKED, SHORT, "1")
    torch.set_num_threads(threads)
    assert last.finish_reason in ("length", "stop")
    assert engine.info().device == "cpu"
    assert touched == []


@pytest.mark.parametrize(
    ("wish", "asked"),
    [
        ("cpu", []),
        ("auto", ["cuda:0", "cuda:1"]),
        ("mixed", ["cuda:0", "cuda:1"]),
        ("cuda", ["cuda:0"]),
        ("cuda:1", ["cuda:1"]),
        ("cuda:7", []),
    ],
)
def test_only_cards_that_are_meant_are_asked(touched: list[str], wish: str, asked: list[str]) -> None:
    assert devices.free_on_cards(wish) == (() if wish == "cpu" else (0, 0))
    assert touched == asked


def test_the_plan_goes_around_a_full_card(touched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EngineSpec("", "", device="auto", quantize="int4")
    assert placement(spec, SHAPES["chatglm-6b"]).device == "cpu"

    def free(card: int) -> tuple[int, int]:
        if card == 0:
            raise torch.AcceleratorError(FULL)
        return 20 * GIB, 24 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    assert placement(spec, SHAPES["chatglm-6b"]).device == "cuda:1"
    monkeypatch.setattr(torch.cuda, "mem_get_info", _broken)
    with pytest.raises(torch.AcceleratorError):  # more memory would not help, so it is told
        placement(spec, SHAPES["chatglm-6b"])


def _broken(card: int) -> tuple[int, int]:
    raise torch.AcceleratorError("CUDA error: unknown error")


def run_beside_a_full_card(connection: Connection, spec: EngineSpec) -> None:
    """Entry of an engine process whose card has nothing left, once it has told that it had."""

    def touch() -> None:
        with Path(os.environ[LOG]).open("a") as file:
            file.write(f"{os.getpid()} {os.environ['CUDA_DEVICE_ORDER']}\n")
        raise torch.AcceleratorError(FULL)

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.mem_get_info = lambda card: (20 * GIB, 24 * GIB)  # type: ignore[misc,assignment]
    torch.cuda._lazy_init = touch
    worker.run(connection, spec)


def test_from_a_full_card_to_the_cpu_in_a_fresh_process(
    monkeypatch: pytest.MonkeyPatch, tiny_chatglm: Callable[[str], Path], tmp_path: Path
) -> None:
    """The whole way down with real processes: the first dies of its card, the second never looks at it."""
    log = tmp_path / "touched"
    monkeypatch.setenv(LOG, str(log))
    monkeypatch.setattr("glmui.engine.process.worker.run", run_beside_a_full_card)
    spec = EngineSpec(
        "tiny", str(tiny_chatglm("int4")), device="cuda", vram_reserve=4 * GIB
    )  # no reserve to give up
    client = EngineClient(spec)
    try:
        *_, last = client.stream_chat(ASKED, SHORT, "1")
        assert (last.note, client.info().device) == ("memory_cpu", "cpu")
        (told,) = {*log.read_text().splitlines()}
        first, order = told.split()
        assert int(first) != client.info().pid
        assert not psutil.pid_exists(int(first)), "what it held of the card is free"
        assert order == "PCI_BUS_ID"
    finally:
        client.close()
