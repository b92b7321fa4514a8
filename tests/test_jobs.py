from __future__ import annotations

import threading

import pytest

from glmui.errors import Busy
from glmui.jobs import MAX_PER_CLIENT, MAX_WAITING, FairQueue, Job
from glmui.types import Chunk, Progress, Usage


def job(client: str, number: int = 0) -> Job:
    return Job(reply_id=number, conversation_id=f"{client}{number}", client=client)


def test_clients_take_turns() -> None:
    queue = FairQueue()
    for one in (job("a", 1), job("a", 2), job("b", 1), job("c", 1)):
        queue.put(one)
    taken = [queue.take() for _ in range(4)]
    assert [(j.client, j.reply_id) for j in taken if j] == [("a", 1), ("b", 1), ("c", 1), ("a", 2)]


def test_each_knows_its_place() -> None:
    queue = FairQueue()
    jobs = [job("a", 1), job("a", 2), job("b", 1)]
    for one in jobs:
        queue.put(one)
    assert [queue.place(one) for one in jobs] == [0, 2, 1]


def test_a_client_may_have_two_waiting_and_the_queue_so_many() -> None:
    queue = FairQueue()
    for number in range(MAX_PER_CLIENT):
        queue.put(job("greedy", number))
    with pytest.raises(Busy, match="2 messages"):
        queue.put(job("greedy", 9))
    for number in range(MAX_WAITING - MAX_PER_CLIENT):
        queue.put(job(f"client {number}"))
    with pytest.raises(Busy, match="32"):
        queue.put(job("late"))


def test_a_waiting_job_can_be_taken_out_a_taken_one_cannot() -> None:
    queue = FairQueue()
    first, second = job("a"), job("b")
    queue.put(first)
    queue.put(second)
    assert queue.remove(second)
    assert queue.take() is first
    assert not queue.remove(first)


def test_closing_wakes_the_taker_and_gives_back_what_waited() -> None:
    queue = FairQueue()
    taken: list[Job | None] = []
    taker = threading.Thread(target=lambda: taken.append(queue.take()))
    taker.start()
    assert queue.close() == []
    taker.join(timeout=5)
    assert taken == [None]


def test_a_job_gathers_what_the_chunks_bring() -> None:
    usage = Usage(3, 2, 1.0, 0.5, 0.5)
    one = Job(1, "c", "tab", content="earlier ")
    one.take(Chunk(progress=Progress("prefill", 0.5)))
    assert one.progress == Progress("prefill", 0.5)
    one.take(Chunk(text="text", tokens=1))
    assert one.progress is None
    one.take(Chunk(tokens=2, finish_reason="stop", usage=usage, note="repetition"))
    assert (one.content, one.tokens, one.finish_reason) == ("earlier text", 2, "stop")
    assert (one.usage, one.note, one.revision) == (usage, "repetition", 3)
