"""The engine process by itself, spoken to through its pipe."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from glmui.engine import wire, worker
from glmui.engine.wire import Wire, chat_values, chunk_from
from glmui.errors import EngineError, GlmuiError, ModelError
from glmui.quant.kernels.cuda.driver import DriverError
from glmui.types import Chunk, EngineSpec, GenerationParams, Message, Progress, Usage

ECHO = EngineSpec("echo", "echo")


class Pipe:
    """A worker and the app's end of its pipe."""

    def __init__(self, spec: EngineSpec) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=worker.run, args=(theirs, spec), daemon=True)
        self.process.start()
        theirs.close()
        self.wire = Wire(self.connection)

    def next(self, *kinds: str) -> dict[str, Any]:
        """The next message of one of these kinds."""
        while True:
            assert self.connection.poll(20), f"no {kinds} came"
            message = self.wire.receive()
            if message["kind"] in kinds:
                return message

    def ask(self, text: str, request_id: str = "1") -> None:
        self.wire.send("chat", id=request_id, **chat_values([Message("user", text)], GenerationParams()))

    def reply(self, text: str, request_id: str = "1") -> list[Chunk]:
        self.ask(text, request_id)
        chunks: list[Chunk] = []
        while not chunks or not chunks[-1].finish_reason:
            chunks.append(chunk_from(self.next("chunk")["chunk"]))
        return chunks


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe(ECHO)
    yield pipe
    pipe.process.kill()
    pipe.process.join()


def test_loads_answers_and_lives_on(pipe: Pipe) -> None:
    assert pipe.next("loaded")["info"]["family"] == "echo"
    for request_id in ("1", "2"):
        chunks = pipe.reply("hello", request_id)
        assert "".join(chunk.text for chunk in chunks).endswith("hello")
    pipe.ask("/echo error", "3")
    message = pipe.next("error")
    assert (message["id"], message["ending"]) == ("3", False)
    assert wire.error_from(message["error"]).code == "engine_failed"
    assert pipe.reply("still there?", "4")[-1].finish_reason == "stop"
    pipe.next("alive")


def test_cancel_is_heard_in_the_middle(pipe: Pipe) -> None:
    pipe.next("loaded")
    pipe.ask("/echo tokens=100000 speed=50")
    pipe.next("chunk")
    pipe.wire.send("cancel", id="1")
    while (chunk := chunk_from(pipe.next("chunk")["chunk"])).finish_reason is None:
        pass
    assert chunk.finish_reason == "cancelled"


def test_ends_after_memory_ran_out(pipe: Pipe) -> None:
    pipe.ask("/echo oom")
    assert pipe.next("error")["ending"] is True
    pipe.process.join(10)
    assert pipe.process.exitcode == 0


@pytest.mark.parametrize("script", ["", "/echo hang", "/echo tokens=100000 speed=50"])
def test_ends_with_its_parent(pipe: Pipe, script: str) -> None:
    pipe.next("loaded")
    if script:
        pipe.ask(script)
        pipe.next("chunk")
    pipe.connection.close()
    pipe.process.join(10)
    assert pipe.process.exitcode == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT between processes")
def test_ctrl_c_is_left_to_the_app(pipe: Pipe) -> None:
    pipe.next("loaded")
    assert pipe.process.pid
    os.kill(pipe.process.pid, signal.SIGINT)
    assert pipe.reply("hello")[-1].finish_reason == "stop"


def test_inherits_no_socket(pipe: Pipe) -> None:
    pipe.next("loaded")
    assert psutil.Process(pipe.process.pid).net_connections("inet") == []


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux")
def test_linux_is_told_to_end_it_before_the_app(pipe: Pipe) -> None:
    pipe.next("loaded")
    scores = [Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in (pipe.process.pid, os.getpid())]
    assert int(scores[0]) > int(scores[1])


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    pipe = Pipe(EngineSpec("broken", str(tmp_path)))
    error = wire.error_from(pipe.next("failed")["error"])
    assert isinstance(error, ModelError)
    assert error.code == "model_file_missing"
    pipe.process.join(10)
    assert pipe.process.exitcode == 0


def explain(error: BaseException) -> GlmuiError:
    return worker.explain(error, "prefill", "cuda:0")


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (
            RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 1 has a total capacity"),
            "cuda:1",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous"), "cuda:0"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "cuda:0",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(h)`"), "cuda:0"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "cuda:0"),
        (
            RuntimeError(
                'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1015'
            ),
            "cuda:0",
        ),
        (DriverError("out of memory", 2), "cuda:0"),
        (RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"), "cuda:0"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"), "mps"),
        (MemoryError(), "cpu"),
        (OSError(12, "Cannot allocate memory"), "cpu"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory"),
            "cpu",
        ),
        (RuntimeError("std::bad_alloc"), "cpu"),
    ],
)
def test_whose_memory_ran_out(error: BaseException, device: str) -> None:
    told = explain(error)
    assert (told.code, told.values) == ("out_of_memory", {"stage": "prefill", "device": device})
    wrapped = ModelError("model_not_loadable", folder="f", detail="d")
    wrapped.__cause__ = error
    assert explain(wrapped).values == told.values


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: device-side assert triggered",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: unknown error",
        "CUDA error: context is destroyed",
    ],
)
def test_a_card_that_failed(words: str) -> None:
    told = explain(RuntimeError(f"{words}\nCUDA kernel errors might be asynchronously reported"))
    assert (told.code, told.values["detail"]) == ("card_fault", words)


def test_a_fault_in_the_drivers_own_words() -> None:
    assert explain(DriverError("unknown error", 999)).code == "card_fault"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the memory of a goldfish"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        OSError(2, "No such file"),
    ],
)
def test_errors_that_are_neither(error: BaseException) -> None:
    assert explain(error).code == "engine_failed"


def test_what_an_error_becomes(caplog: pytest.LogCaptureFixture) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    for error in (
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ):
        assert explain(error).code == "out_of_memory"
    told = EngineError("nan_logits")
    assert explain(told) is told
    assert not caplog.records
    unforeseen = explain(KeyError("wte"))
    assert unforeseen.code == "engine_failed"
    assert "KeyError" in unforeseen.message()
    assert "KeyError" in worker.trace_of(KeyError("wte"))
    assert worker.trace_of(told) == ""


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(text="半\ud800", tokens=3),
        Chunk(progress=Progress("loading", 0.5)),
        Chunk(finish_reason="stop", usage=Usage(1, 2, 0.5, 0.1, 0.4), note="repetition"),
    ],
)
def test_chunks_cross_the_pipe_whole(chunk: Chunk) -> None:
    ours, theirs = multiprocessing.Pipe()
    Wire(ours).send("chunk", chunk=asdict(chunk))
    assert chunk_from(Wire(theirs).receive()["chunk"]) == chunk
    ours.close()
    theirs.close()
