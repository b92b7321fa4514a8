"""Ids below, chunks above: where a reply ends, how long it may be, and how soon Stop is heard."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from glmui.engine.generate import RepetitionWatch, Speaker, generate_ids, stream_reply
from glmui.engine.sampling import Sampler, make_generator
from glmui.errors import EngineError, InvalidInput
from glmui.text.detokenise import StreamingDetokeniser
from glmui.types import Chunk, GenerationParams, Progress

GREEDY = GenerationParams(temperature=0)
STOP = 255


class Parrot:
    """A decoder over bytes that writes `text` whatever it reads, then stops (or begins again)."""

    device = torch.device("cpu")

    def __init__(self, text: str, stops: bool = True, pieces: int = 4) -> None:
        self._ids = [*text.encode(), *([STOP] if stops else [])]
        self._pieces = pieces
        self.read: list[int] = []
        self.steps = 0

    def prefill(self, ids: list[int], on_piece: Callable[[float], None]) -> Tensor:
        for piece in range(self._pieces):
            on_piece((piece + 1) / self._pieces)
        self.read = list(ids)
        return self._next()

    def step(self, token: int) -> Tensor:
        self.read.append(token)
        self.steps += 1
        return self._next()

    def _next(self) -> Tensor:
        logits = torch.zeros(256)
        logits[self._ids[self.steps % len(self._ids)]] = 1
        return logits


def decode(ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i != STOP).decode("utf-8", errors="replace")


def text() -> StreamingDetokeniser:
    return StreamingDetokeniser(decode)


def speaker(parrot: Parrot, **values: object) -> Speaker:
    return Speaker(parrot, {STOP}, **values)  # type: ignore[arg-type]


def say(
    parrot: Parrot,
    params: GenerationParams = GREEDY,
    prompt: int = 5,
    cancelled: Callable[[], bool] = lambda: False,
    **values: object,
) -> tuple[str, Chunk]:
    chunks = list(stream_reply(speaker(parrot, **values), [1] * prompt, text(), params, cancelled))
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    return "".join(chunk.text for chunk in chunks), chunks[-1]


def test_a_reply_to_its_stop() -> None:
    text, last = say(Parrot("你好 😀!"))
    assert text == "你好 😀!"
    assert last.finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.prompt_tokens == 5
    assert last.usage.completion_tokens == last.tokens == len("你好 😀!".encode()) + 1
    assert 0 < last.usage.first_token_seconds <= last.usage.seconds


def test_never_half_a_character() -> None:
    chunks = list(stream_reply(speaker(Parrot("语😀")), [1], text(), GREEDY, lambda: False))
    assert [chunk.text for chunk in chunks if chunk.text] == ["语", "😀"]


def test_max_length_bounds_prompt_and_reply() -> None:
    text, last = say(Parrot("x", stops=False), GenerationParams(temperature=0, max_length=64), prompt=60)
    assert (text, last.finish_reason) == ("xxxx", "length")


def test_max_new_tokens_bounds_the_reply() -> None:
    text, last = say(Parrot("ab", stops=False), GenerationParams(temperature=0, max_new_tokens=3))
    assert (text, last.finish_reason) == ("aba", "length")


def test_a_stop_in_the_last_place_is_a_stop() -> None:
    _, last = say(Parrot("ab"), GenerationParams(temperature=0, max_new_tokens=3))
    assert last.finish_reason == "stop"


def test_what_the_model_can_take_bounds_too() -> None:
    text, _ = say(Parrot("x", stops=False), prompt=10, context_length=12)
    assert text == "xx"


@pytest.mark.parametrize("prompt", [64, 65, 1000])
def test_a_prompt_that_fills_max_length_is_refused(prompt: int) -> None:
    with pytest.raises(InvalidInput) as raised:
        say(Parrot("x"), GenerationParams(max_length=64), prompt=prompt)
    assert raised.value.code == "prompt_too_long"
    assert raised.value.values == {"tokens": prompt, "limit": 63}


def test_stop_in_the_prefill_ends_it_at_the_next_piece() -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked >= 3

    parrot = Parrot("abc")
    text, last = say(parrot, cancelled=cancelled)
    assert (text, last.finish_reason, last.tokens) == ("", "cancelled", 0)
    assert parrot.read == []


def test_stop_in_decode_costs_no_further_step() -> None:
    parrot, stopped = Parrot("x", stops=False), False
    stream = stream_reply(speaker(parrot), [1], text(), GREEDY, lambda: stopped)
    for _ in range(5):
        next(stream)
    stopped = True
    rest = list(stream)
    assert [chunk.finish_reason for chunk in rest] == ["cancelled"]
    assert rest[0].tokens == 5
    assert parrot.steps == 4


def test_prefill_is_reported() -> None:
    seen: list[Progress] = []
    say(Parrot("a"), on_progress=seen.append)
    assert {progress.stage for progress in seen} == {"prefill"}
    assert (seen[0].fraction, seen[-1].fraction) == (0.0, 1.0)


def test_a_loop_is_ended_and_noted() -> None:
    text, last = say(Parrot("the same. ", stops=False))
    assert (last.finish_reason, last.note) == ("stop", "repetition")
    assert len(text) < 120


def test_a_loop_may_be_left_alone() -> None:
    params = GenerationParams(temperature=0, max_new_tokens=400)
    text, last = say(Parrot("the same. ", stops=False), params, stop_repetition=False)
    assert (len(text), last.finish_reason, last.note) == (400, "length", "")


@pytest.mark.parametrize(
    "harmless",
    [
        "-" * 80 + "\n",
        "ha " * 20,
        "|---" * 12,
        "Row, row, row your boat, gently down the stream.\n" * 3,
        "0, " * 30,
    ],
)
def test_ordinary_repetition_passes(harmless: str) -> None:
    watch = RepetitionWatch()
    assert not any(watch.add(i) for i in f"Once {harmless} upon a time".encode())


@pytest.mark.parametrize("period", [1, 2, 7, 31, 160])
def test_loops_of_any_period_are_noticed(period: int) -> None:
    watch = RepetitionWatch()
    ids = [*range(1000, 1300), *list(range(period)) * 200]
    noticed = next(place for place, token in enumerate(ids) if watch.add(token))
    assert noticed - 300 < max(96, 5 * period)


def test_broken_numbers_are_told() -> None:
    class Broken(Parrot):
        def _next(self) -> Tensor:
            return torch.full((256,), float("nan"))

    with pytest.raises(EngineError, match="NaN"):
        say(Broken("a"))


def test_a_seed_repeats_a_reply() -> None:
    class Dice(Parrot):
        def _next(self) -> Tensor:
            return torch.zeros(128)

    def roll(seed: int | None) -> str:
        params = GenerationParams(temperature=1.0, top_k=0, top_p=1.0, seed=seed, max_new_tokens=20)
        return say(Dice("a"), params)[0]

    assert roll(3) == roll(3) != roll(4)
    assert make_generator(3, "cpu").initial_seed() == 3


@pytest.mark.parametrize("ahead", [False, True])
def test_a_card_takes_the_next_step_while_an_id_is_read(ahead: bool) -> None:
    """And no step that nobody needs: after a stop, or at the limit."""
    for stops, limit, steps in ((True, 10, 2), (False, 2, 1)):
        parrot, begun = Parrot("ab", stops), list[int]()
        sampler = Sampler(GREEDY)
        ids = []
        for token in generate_ids(parrot, [1], sampler, limit, {STOP}, lambda: False, ahead=ahead):
            ids.append(token)
            begun.append(parrot.steps)
        assert bytes(i for i in ids if i != STOP) == b"ab"
        assert begun == [min(count + ahead, steps) for count in range(len(ids))]
        assert parrot.steps == steps


def test_a_card_too_is_stopped_before_the_next_id() -> None:
    parrot, asked = Parrot("abc"), iter([False] * 6 + [True])  # five times in the prefill
    ids = list(generate_ids(parrot, [1], Sampler(GREEDY), 9, {STOP}, lambda: next(asked), ahead=True))
    assert bytes(ids) == b"a"
    assert parrot.steps == 1  # the one that was begun
