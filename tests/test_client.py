"""The app's side of the engine: lazy start, Stop everywhere, death, hanging, and giving memory back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from glmui import notes
from glmui.engine import client as client_module
from glmui.engine.client import EngineClient
from glmui.engine.process import EngineProcess
from glmui.errors import EngineError, GlmuiError, ModelError, to_values
from glmui.memory import witness
from glmui.types import Chunk, EngineSpec, GenerationParams, Message
from tests.tiny_llama import make_tiny_llama

ECHO = EngineSpec("echo", "echo")
PARAMS = GenerationParams()
ENDLESS = "/echo tokens=100000 speed=50"


def ask(
    client: EngineClient, text: str, request_id: str = "1", then: Callable[[Chunk], None] = lambda chunk: None
) -> list[Chunk]:
    """The whole reply; `then` is called with each chunk."""
    chunks = []
    for chunk in client.stream_chat([Message("user", text)], PARAMS, request_id):
        chunks.append(chunk)
        then(chunk)
    return chunks


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def pid_of(client: EngineClient) -> int:
    pid = client.info().pid
    assert pid is not None
    return pid


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def kill(client: EngineClient) -> None:
    os.kill(pid_of(client), signal.SIGKILL)


def stages_of(chunks: list[Chunk]) -> list[str]:
    """The stages, each once where it was shown several times on end."""
    stages = [chunk.progress.stage for chunk in chunks if chunk.progress]
    return [stage for stage, before in zip(stages, ["", *stages], strict=False) if stage != before]


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture(scope="module")
def shared() -> Iterator[EngineClient]:
    """For tests that leave the process as they found it."""
    client = EngineClient(ECHO)
    yield client
    client.close()


@pytest.fixture
def client() -> Iterator[EngineClient]:
    client = EngineClient(ECHO, hang_seconds=0.5)
    yield client
    client.close()


@pytest.fixture
def patient() -> Iterator[EngineClient]:
    """One that a busy machine does not make take its process for hung."""
    client = EngineClient(ECHO)
    yield client
    client.close()


# The ordinary course


def test_starts_with_the_first_message_and_stays(shared: EngineClient) -> None:
    assert shared.info().state == "asleep"
    assert shared.info().family == "echo"
    first = ask(shared, "hello")
    assert text_of(first) == "You said: hello"
    stages = [chunk.progress.stage for chunk in first if chunk.progress]
    assert stages[:2] == ["starting", "loading"]
    assert stages[-1] == "prefill"
    assert first[-1].finish_reason == "stop"
    assert first[-1].usage is not None
    assert shared.info().state == "ready"
    pid = pid_of(shared)
    ask(shared, "again", "2")
    assert pid_of(shared) == pid


def test_an_error_of_the_reply_leaves_the_engine_alone(shared: EngineClient) -> None:
    ask(shared, "hello", "3")
    pid = pid_of(shared)
    with pytest.raises(EngineError) as raised:
        ask(shared, "/echo error", "4")
    assert raised.value.code == "engine_failed"
    ask(shared, "hello", "5")
    assert pid_of(shared) == pid


def test_a_large_message_crosses(shared: EngineClient) -> None:
    text = "字" * 20_000
    chunks = list(
        shared.stream_chat([Message("user", text)], GenerationParams(max_length=32768, max_new_tokens=3), "6")
    )
    assert chunks[-1].finish_reason == "length"


def test_replies_take_turns(shared: EngineClient) -> None:
    shared_chunks: dict[str, list[Chunk]] = {}

    def run(request_id: str) -> None:
        shared_chunks[request_id] = ask(shared, f"/echo tokens=20 speed=100 {request_id}", request_id)

    threads = [threading.Thread(target=run, args=(f"turn{n}",)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(chunks[-1].tokens == 20 for chunks in shared_chunks.values())
    queued = [
        c for chunks in shared_chunks.values() for c in chunks if c.progress and c.progress.stage == "queued"
    ]
    assert len(queued) == 2


def test_nothing_chosen() -> None:
    client = EngineClient()
    with pytest.raises(EngineError) as raised:
        ask(client, "hello")
    assert raised.value.code == "no_model"
    client.close()


# Stop


def test_stop_in_decode(shared: EngineClient) -> None:
    stopped_at = 0.0

    def stop(chunk: Chunk) -> None:
        nonlocal stopped_at
        if chunk.tokens == 3:
            shared.cancel("stop")
            stopped_at = time.monotonic()

    chunks = ask(shared, ENDLESS, "stop", stop)
    assert time.monotonic() - stopped_at < 0.5
    assert chunks[-1].finish_reason == "cancelled"
    assert chunks[-1].usage is not None
    assert ask(shared, "next", "stop2")[-1].finish_reason == "stop"


def test_stop_in_prefill(shared: EngineClient) -> None:
    ask(shared, "hello", "p0")

    def stop(chunk: Chunk) -> None:
        if chunk.progress and chunk.progress.stage == "prefill":
            shared.cancel("p1")

    chunks = ask(shared, "/echo prefill=30", "p1", stop)
    assert (text_of(chunks), chunks[-1].finish_reason) == ("", "cancelled")


def test_stop_while_queued_and_before(shared: EngineClient) -> None:
    shared.cancel("early")
    assert [chunk.finish_reason for chunk in ask(shared, "hello", "early")] == ["cancelled"]
    running = threading.Thread(target=ask, args=(shared, ENDLESS, "long"))
    running.start()
    assert wait_for(shared._turn.locked)
    queued = ask(shared, "hello", "queued", lambda chunk: shared.cancel("queued"))
    assert [chunk.finish_reason for chunk in queued] == [None, "cancelled"]
    shared.cancel("long")
    running.join(5)
    assert not running.is_alive()


def test_closing_the_iterator_stops_the_reply(shared: EngineClient) -> None:
    stream = shared.stream_chat([Message("user", ENDLESS)], PARAMS, "closed")
    while not next(stream).text:
        pass
    stream.close()  # type: ignore[attr-defined]
    assert ask(shared, "next", "after")[-1].finish_reason == "stop"


def test_closing_the_iterator_while_loading_leaves_nothing_to_generate() -> None:
    client = EngineClient(EngineSpec("echo load=1", "echo"))
    stream = client.stream_chat([Message("user", ENDLESS)], PARAMS, "closed")
    while (chunk := next(stream)).progress is None or chunk.progress.stage != "loading":
        pass
    stream.close()  # type: ignore[attr-defined]
    began = time.monotonic()
    assert ask(client, "next", "after")[-1].finish_reason == "stop"
    assert time.monotonic() - began < 10
    client.close()


def test_stop_while_loading_ends_the_load() -> None:
    client = EngineClient(EngineSpec("echo load=60", "echo"))
    pids: list[int] = []

    def stop(chunk: Chunk) -> None:
        if chunk.progress and chunk.progress.stage == "loading" and not pids:
            pids.append(pid_of(client))
            client.cancel("1")

    began = time.monotonic()
    chunks = ask(client, "hello", "1", stop)
    assert chunks[-1].finish_reason == "cancelled"
    assert time.monotonic() - began < 20
    assert wait_for(lambda: gone(pids[0]))
    assert client.info().state == "asleep"
    client.close()


# Death


def test_killed_in_mid_reply(client: EngineClient) -> None:
    seen: list[Chunk] = []
    killed_at = 0.0

    def kill(chunk: Chunk) -> None:
        nonlocal killed_at
        seen.append(chunk)
        if chunk.tokens == 3:
            os.kill(pid_of(client), signal.SIGKILL)
            killed_at = time.monotonic()

    with pytest.raises(EngineError) as raised:
        ask(client, ENDLESS, "1", kill)
    assert time.monotonic() - killed_at < 2
    assert (raised.value.code, raised.value.values["detail"]) == ("engine_died", "SIGKILL")
    assert text_of(seen).startswith("word word")
    assert client.info().state == "asleep"
    assert ask(client, "hello", "2")[-1].finish_reason == "stop"


def test_dying_again_and_again_is_said_and_forgiven(client: EngineClient) -> None:
    for n in range(client_module.MOST_DEATHS):
        with pytest.raises(EngineError) as raised:
            ask(client, "/echo crash", f"{n}")
        assert raised.value.code == "engine_died"
    with pytest.raises(EngineError) as raised:
        ask(client, "hello", "then")
    assert raised.value.code == "engine_keeps_dying"
    assert client.info().state == "failed"
    client.unload()
    assert ask(client, "hello", "forgiven")[-1].finish_reason == "stop"


def test_killed_while_idle(client: EngineClient) -> None:
    ask(client, "hello")
    pid = pid_of(client)
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: client.info().state == "asleep")
    assert ask(client, "hello", "2")[-1].finish_reason == "stop"
    assert pid_of(client) != pid


def test_being_killed_is_no_fault_of_the_engine(patient: EngineClient) -> None:
    for n in range(client_module.MOST_DEATHS + 1):
        with pytest.raises(EngineError) as raised:
            ask(patient, ENDLESS, f"{n}", lambda chunk: kill(patient) if chunk.tokens == 1 else None)
        assert raised.value.code == "engine_died"
        assert patient.info().reason == ""
    assert ask(patient, "hello", "after")[-1].finish_reason == "stop"


@pytest.mark.parametrize("stage", ["loading", "prefill"])
def test_killed_before_any_text(patient: EngineClient, stage: str) -> None:
    """By somebody, not for want of memory: nothing is lowered, nor tried again, and nothing is left."""
    patient.configure(EngineSpec("echo load=0.3", "echo"))
    pids: list[int] = []

    def then(chunk: Chunk) -> None:
        if chunk.progress and chunk.progress.stage == stage and not pids:
            pids.append(pid_of(patient))
            kill(patient)

    with pytest.raises(EngineError) as raised:
        ask(patient, "/echo prefill=1", "1", then)
    assert (raised.value.code, raised.value.values["detail"]) == ("engine_died", "SIGKILL")
    assert gone(pids[0])
    assert (patient.info().state, patient.info().reason) == ("asleep", "")
    assert ask(patient, "hello", "2")[-1].finish_reason == "stop"
    assert len(pids) == 1


@pytest.mark.parametrize("how", ["hang", pytest.param("frozen", marks=pytest.mark.slow)])
def test_a_hung_engine_is_replaced(client: EngineClient, how: str) -> None:
    def freeze(chunk: Chunk) -> None:
        if chunk.text and how == "frozen":
            os.kill(pid_of(client), signal.SIGSTOP)

    ask(client, "hello", "0")
    pid = pid_of(client)
    with pytest.raises(EngineError) as raised:
        ask(client, "/echo hang" if how == "hang" else ENDLESS, "1", freeze)
    assert raised.value.code == "engine_hung"
    assert gone(pid)
    assert ask(client, "hello", "2")[-1].finish_reason == "stop"


def test_stop_frees_the_reader_from_a_hung_engine(client: EngineClient) -> None:
    client._hang_seconds = 60

    def stop(chunk: Chunk) -> None:
        if chunk.tokens == 5:
            client.cancel("1")

    began = time.monotonic()
    assert ask(client, "/echo hang", "1", stop)[-1].finish_reason == "cancelled"
    assert time.monotonic() - began < 10


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    client = EngineClient(EngineSpec("broken", str(tmp_path)))
    for _ in range(client_module.MOST_DEATHS + 1):  # a refusal is no death
        with pytest.raises(ModelError):
            ask(client, "hello")
    assert client.info().pid is None
    client.close()


# Memory


@pytest.fixture
def on_card() -> Iterator[EngineClient]:
    """An engine that pretends to be on a card."""
    client = EngineClient(EngineSpec("echo", "echo", device="cuda"))
    yield client
    client.close()


def test_without_text_a_reply_begins_anew_with_less(on_card: EngineClient) -> None:
    chunks = ask(on_card, "/echo piece=64")
    assert stages_of(chunks) == ["starting", "loading", "prefill"] * 2
    assert (text_of(chunks), chunks[-1].finish_reason) == ("piece=64", "stop")
    assert chunks[-1].note == notes.note("memory_pieces", tokens=64)
    assert on_card.info().reason == "reasons.memory_pieces"
    pid = pid_of(on_card)
    again = ask(on_card, "/echo piece=64", "2")
    assert (pid_of(on_card), again[-1].note) == (pid, "")


def test_layers_leave_the_card_in_the_end(on_card: EngineClient) -> None:
    on_card.configure(EngineSpec("echo", "echo", device="mixed", layers_on_gpu=4))
    assert ask(on_card, "/echo layers=2")[-1].note == notes.note("memory_layers", layers=2)
    assert ask(on_card, "/echo layers=0", "2")[-1].note == "memory_cpu"
    assert on_card.info().device == "cpu"
    with pytest.raises(EngineError) as raised:
        ask(on_card, "/echo oom context=100", "3")
    assert raised.value.code == "memory_kept.context"


def test_only_the_load_that_somebody_waits_for_is_hasty(
    on_card: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the same rung later, after idling: what they leave undone would never be done."""
    loads: list[bool] = []

    def started(spec: EngineSpec) -> EngineProcess:
        loads.append(spec.hasty)
        return EngineProcess(spec)

    monkeypatch.setattr(client_module, "EngineProcess", started)
    ask(on_card, "/echo piece=64")
    on_card._end_process()  # as after idling
    ask(on_card, "/echo piece=64", "2")
    assert on_card.info().reason == "reasons.memory_pieces"
    assert loads == [False, True, False]


def test_a_model_that_its_card_cannot_hold_loads_elsewhere(on_card: EngineClient) -> None:
    on_card.configure(EngineSpec("echo layers=0", "echo", device="cuda"))
    chunks = ask(on_card, "hello")
    assert stages_of(chunks)[-3:] == ["starting", "loading", "prefill"]
    assert (text_of(chunks), chunks[-1].note) == ("You said: hello", "memory_cpu")


def test_a_model_that_nothing_can_hold_is_refused_each_time_anew(patient: EngineClient) -> None:
    patient.configure(EngineSpec("echo piece=1", "echo"))
    for n in range(client_module.MOST_DEATHS + 1):
        with pytest.raises(EngineError) as raised:
            ask(patient, "hello", f"{n}")
        assert raised.value.code == "out_of_memory"
        assert "(RAM) ran out while the conversation was being read" in str(raised.value)
    assert patient.info().state == "asleep"


def test_text_is_kept_and_the_next_message_has_less(patient: EngineClient) -> None:
    seen: list[Chunk] = []
    with pytest.raises(EngineError) as raised:
        ask(patient, "/echo oom context=1024 tokens=7", "1", seen.append)
    assert text_of(seen)
    assert seen[-1].tokens == 7
    assert (raised.value.code, raised.value.values) == ("memory_kept.context", {"tokens": 1024})
    began = time.monotonic()
    chunks = ask(patient, "/echo oom context=1024 tokens=7", "2")
    assert time.monotonic() - began < 10
    assert (chunks[-1].finish_reason, chunks[-1].note) == ("stop", "")
    assert patient.info().context_room == 1024


def test_unloading_or_choosing_again_gives_back_what_was_taken(patient: EngineClient) -> None:
    for undo in (patient.unload, lambda: patient.configure(EngineSpec("echo again", "echo"))):
        with pytest.raises(EngineError):
            ask(patient, "/echo oom", "1")
        assert patient.info().reason == "reasons.memory_context"
        undo()
        assert patient.info().reason == ""
        ask(patient, "hello", "2")
        assert patient.info().context_room == 0


def test_unloading_between_two_attempts_ends_the_reply(patient: EngineClient) -> None:
    def unload(chunk: Chunk) -> None:
        if chunk.progress and chunk.progress.stage == "starting":
            starts.append(chunk)
            if len(starts) == 2:
                patient.unload()

    starts: list[Chunk] = []
    assert ask(patient, "/echo piece=64", "1", unload)[-1].finish_reason == "cancelled"
    assert patient.info().pid is None


@pytest.mark.slow
def test_twenty_times_in_a_row(patient: EngineClient) -> None:
    for n in range(20):
        seen: list[Chunk] = []
        with pytest.raises(EngineError) as raised:
            ask(patient, "/echo oom tokens=2", f"{n}", seen.append)
        assert raised.value.code in ("memory_kept.context", "out_of_memory")
        assert text_of(seen)
    began = time.monotonic()
    assert ask(patient, "hello", "after")[-1].finish_reason == "stop"
    assert time.monotonic() - began < 10


@pytest.fixture
def kill_for_memory(patient: EngineClient, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Kills the engine process as the kernel does, which counts it. Once."""
    kills = [7]
    monkeypatch.setattr(witness, "count_kills", lambda: kills[0])

    def kill_it() -> None:
        process = patient._process
        if process and kills == [7]:
            kill(patient)
            assert wait_for(lambda: process.dead)
            kills[0] = 8

    return kill_it


def test_killed_by_the_kernel_before_any_text(
    patient: EngineClient, kill_for_memory: Callable[[], None]
) -> None:
    def then(chunk: Chunk) -> None:
        if chunk.progress and chunk.progress.stage == "prefill":
            kill_for_memory()

    chunks = ask(patient, "/echo prefill=1", "1", then)
    assert text_of(chunks) == "prefill=1"
    assert chunks[-1].note == notes.note("memory_pieces", tokens=64)


def test_killed_by_the_kernel_in_mid_reply(
    patient: EngineClient, kill_for_memory: Callable[[], None]
) -> None:
    seen: list[Chunk] = []

    def then(chunk: Chunk) -> None:
        seen.append(chunk)
        if chunk.tokens == 3:
            kill_for_memory()

    with pytest.raises(EngineError) as raised:
        ask(patient, ENDLESS, "1", then)
    assert raised.value.code == "memory_kept.context"
    assert text_of(seen) == "word word"
    assert ask(patient, "hello", "2")[-1].finish_reason == "stop"


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_AS"), reason="Linux bounds another process's memory")
def test_a_real_memory_error(patient: EngineClient) -> None:
    ask(patient, "hello")
    engine = psutil.Process(pid_of(patient))
    bound = engine.memory_info().vms + 100_000_000
    engine.rlimit(psutil.RLIMIT_AS, (bound, bound))
    chunks = ask(patient, "/echo hog=200", "2")  # there is room for it in the next process
    assert text_of(chunks) == "hog=200"
    assert chunks[-1].note == notes.note("memory_pieces", tokens=64)
    assert gone(engine.pid)


# A card's fault


class FaultyCard:
    """Engine processes whose card reports a fault instead of some messages. stages: which, one a process."""

    def __init__(self, *stages: str) -> None:
        self.stages = list(stages)
        self.pids: list[int | None] = []

    def __call__(self, spec: EngineSpec) -> EngineProcess:
        stage = self.stages.pop(0) if self.stages else ""
        process = _Faulty(spec, stage)
        self.pids.append(process.pid)
        return process


class _Faulty(EngineProcess):
    def __init__(self, spec: EngineSpec, stage: str) -> None:
        super().__init__(spec)
        self._stage = stage

    def next_event(self, seconds: float) -> dict[str, Any] | None:
        event = super().next_event(seconds)
        chunk = event.get("chunk") if event else None
        if not (event and chunk and self._stage):
            return event
        stage = chunk["progress"]["stage"] if chunk["progress"] else "decode" if chunk["tokens"] > 1 else ""
        if stage != self._stage:
            return event
        kind = {"kind": "failed"} if stage == "loading" else {"kind": "error", "ending": True}
        fault = EngineError("card_fault", detail="CUDA error: unknown error")
        return {**kind, "id": event["id"], "error": to_values(fault), "trace": ""}


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FaultyCard]:
    def card(*stages: str) -> FaultyCard:
        made = FaultyCard(*stages)
        monkeypatch.setattr(client_module, "EngineProcess", made)
        return made

    return card


@pytest.mark.parametrize("stage", ["loading", "prefill"])
def test_a_card_that_failed_before_any_text_is_tried_once_more(
    patient: EngineClient, faulty: Callable[..., FaultyCard], stage: str
) -> None:
    card = faulty(stage)
    chunks = ask(patient, "hello")
    assert (text_of(chunks), chunks[-1].finish_reason) == ("You said: hello", "stop")
    assert len(card.pids) == 2
    assert card.pids[0]
    assert gone(card.pids[0]), "nothing on a card that failed can be trusted in its process"
    assert (patient.info().reason, chunks[-1].note) == ("", ""), "nothing was lowered"


def test_a_card_that_fails_again_is_told(patient: EngineClient, faulty: Callable[..., FaultyCard]) -> None:
    card = faulty("prefill", "loading")
    for request_id in ("1", "2"):  # each message may try once more
        with pytest.raises(EngineError) as raised:
            ask(patient, "hello", request_id)
        assert (raised.value.code, len(card.pids)) == ("card_fault", 2)
        card = faulty("loading", "prefill")
    faulty()
    assert ask(patient, "hello", "3")[-1].finish_reason == "stop"


def test_text_that_came_before_a_fault_is_kept(
    patient: EngineClient, faulty: Callable[..., FaultyCard]
) -> None:
    card, seen = faulty("decode"), list[Chunk]()
    with pytest.raises(EngineError) as raised:
        ask(patient, "hello", "1", seen.append)
    assert (raised.value.code, len(card.pids)) == ("card_fault", 1)
    assert text_of(seen)


def test_memory_that_runs_out_after_a_fault_still_goes_a_rung_down(
    on_card: EngineClient, faulty: Callable[..., FaultyCard]
) -> None:
    card = faulty("loading")
    assert ask(on_card, "/echo piece=64")[-1].note == notes.note("memory_pieces", tokens=64)
    assert len(card.pids) == 3


# Giving memory back


def test_unload_ends_the_process(client: EngineClient) -> None:
    ask(client, "hello")
    pid = pid_of(client)
    client.unload()
    assert gone(pid)
    assert client.info().state == "asleep"
    assert ask(client, "hello", "2")[-1].finish_reason == "stop"


def test_unload_in_mid_reply_ends_it_as_cancelled(client: EngineClient) -> None:
    def unload(chunk: Chunk) -> None:
        if chunk.tokens == 2:
            client.unload()

    assert ask(client, ENDLESS, "1", unload)[-1].finish_reason == "cancelled"
    assert ask(client, "hello", "2")[-1].finish_reason == "stop"


def test_idle_for_long_enough() -> None:
    client = EngineClient(ECHO, idle_seconds=0.2)
    pids: set[int] = set()

    def note(chunk: Chunk) -> None:
        if chunk.tokens:
            pids.add(pid_of(client))

    ask(
        client, "/echo tokens=30 speed=60", then=note
    )  # longer than idle_seconds: a running reply is not idle
    assert len(pids) == 1
    assert wait_for(lambda: gone(*pids))
    assert wait_for(lambda: client.info().state == "asleep")
    client.close()


def test_never_idle_when_told_so() -> None:
    client = EngineClient(ECHO, idle_seconds=0.1)
    ask(client, "hello")
    client.set_idle_seconds(0)
    ask(client, "/echo tokens=20 speed=60", "2")
    assert not wait_for(lambda: client.info().state == "asleep", 0.5)
    client.close()


def test_another_model(client: EngineClient) -> None:
    ask(client, "hello")
    pid = pid_of(client)
    client.configure(ECHO)
    assert pid_of(client) == pid
    client.configure(EngineSpec("echo again", "echo"))
    assert gone(pid)
    assert client.info().model == "echo again"
    ask(client, "hello", "2")
    assert client.info().model == "echo again"


def test_another_model_in_mid_reply(client: EngineClient) -> None:
    pids = []

    def change(chunk: Chunk) -> None:
        if chunk.tokens == 1:
            pids.append(pid_of(client))
            client.configure(EngineSpec("echo again", "echo"))

    chunks = ask(client, "/echo tokens=10", "1", change)
    assert (chunks[-1].finish_reason, chunks[-1].tokens) == ("stop", 10)
    assert gone(pids[0])


@pytest.mark.parametrize("script", ["hello", "/echo hang", ENDLESS])
def test_close_ends_everything_quickly(script: str) -> None:
    client = EngineClient(ECHO)
    begun = threading.Event()

    def run() -> None:
        try:
            ask(client, script, "1", lambda chunk: begun.set() if chunk.text else None)
        except GlmuiError:
            pass

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(20)
    pid = client.info().pid
    began = time.monotonic()
    client.close()
    assert time.monotonic() - began < 2
    assert pid is None or gone(pid)
    thread.join(5)
    assert not thread.is_alive()
    with pytest.raises(EngineError):
        ask(client, "hello", "2")


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_no_orphan_when_the_app_is_killed(tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    app.write_text(
        "import os, signal\n"
        "from glmui.engine.client import EngineClient\n"
        "from glmui.types import EngineSpec, GenerationParams, Message\n"
        "if __name__ == '__main__':\n"
        "    client = EngineClient(EngineSpec('echo', 'echo'))\n"
        "    list(client.stream_chat([Message('user', 'hi')], GenerationParams(), '1'))\n"
        "    print(client.info().pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n",
        encoding="utf-8",
    )
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(
        [sys.executable, str(app)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
        timeout=60,
        check=False,
    )
    assert wait_for(lambda: gone(int(run.stdout)))


# A real model behind the pipe


@pytest.mark.slow
def test_a_transformers_model_through_the_process(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "tiny")
    client = EngineClient(EngineSpec("tiny", str(folder), device="cpu", threads=1))
    params = GenerationParams(temperature=0, max_new_tokens=8)
    assert client.info().context_length == 512

    def reply(request_id: str) -> str:
        return text_of(list(client.stream_chat([Message("user", "Hello")], params, request_id)))

    assert reply("1") == reply("2") != ""
    info = client.info()
    assert (info.state, info.family, info.dtype) == ("ready", "causal_lm", "float32")
    client.close()
