"""Two stacked generators: ids below (knows no text), chunks of text above."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from glmui.engine.request import Stopwatch, room
from glmui.engine.sampling import Sampler, make_generator
from glmui.types import Chunk, FinishReason, GenerationParams, Progress


class Decoder(Protocol):
    """A model and its KV cache, for one sequence at a time."""

    device: torch.device

    def prefill(self, ids: list[int], on_piece: Callable[[float], None]) -> Tensor:
        """Read a whole prompt and return the logits [vocab] of its last position.

        Calls on_piece(part done, 0..1) after each piece. on_piece may raise (that is how Stop comes through):
        let it pass, and leave the cache in a state from which the next prefill is right.
        """
        ...

    def step(self, token: int) -> Tensor:
        """Append one id and return the logits [vocab] that follow it."""
        ...

    def renew(self) -> None:
        """Forget everything read so far, and give its memory back: the next prefill begins anew."""
        ...


class Detokeniser(Protocol):
    def add(self, token: int) -> str: ...

    def finish(self) -> str: ...


class Cancelled(Exception):
    """Raised out of a prefill by its on_piece; never leaves this module."""


@dataclass(frozen=True, slots=True)
class Speaker:
    """What a loaded model brings along to answer.

    context_length: ids the model can take at all, room: ids there is memory for, each 0 for no bound.
    on_progress: told how far the prefill is, at most a few times a second. ahead: whether a step of the
    decoder only starts work that goes on beside Python.
    """

    decoder: Decoder
    stop_ids: Collection[int]
    context_length: int = 0
    room: int = 0
    stop_repetition: bool = True
    on_progress: Callable[[Progress], None] = field(default=lambda progress: None)
    ahead: bool = False


def generate_ids(
    decoder: Decoder,
    prompt_ids: list[int],
    sampler: Sampler,
    limit: int,
    stop_ids: Collection[int],
    cancelled: Callable[[], bool],
    on_piece: Callable[[float], None] = lambda part: None,
    ahead: bool = False,
) -> Iterator[int]:
    """Yield at most `limit` ids; a stop id is yielded too and is the last.

    `cancelled` is asked after each piece of the prefill and before each id. ahead: take the next step before
    an id is yielded, so that a card computes while the id is made use of; a CPU would only yield it later.
    Raises EngineError("nan_logits").
    """

    def step(token: int) -> Tensor:
        with torch.inference_mode():
            return decoder.step(token)

    def piece(part: float) -> None:
        if cancelled():
            raise Cancelled
        on_piece(part)

    with torch.inference_mode():
        try:
            piece(0.0)
            logits = decoder.prefill(prompt_ids, piece)
        except Cancelled:
            return
    seen = list(prompt_ids)
    for count in range(1, limit + 1):
        if cancelled():
            return
        with torch.inference_mode():
            token = sampler(logits[None], [seen])[0]
        seen.append(token)
        last = token in stop_ids or count == limit
        if ahead and not last:
            logits = step(token)
        yield token
        if last or cancelled():
            return
        if not ahead:
            logits = step(token)


def stream_reply(
    speaker: Speaker,
    prompt_ids: list[int],
    text: Detokeniser,
    params: GenerationParams,
    cancelled: Callable[[], bool],
) -> Iterator[Chunk]:
    """Yield the reply as chunks of whole characters; the last has finish_reason and usage.

    text: a fresh detokeniser, which makes them.

    Raises InvalidInput("prompt_too_long" or "prompt_beyond_memory") when max_length, or memory, leaves no
    room for a single id, and EngineError("nan_logits").
    """
    limit = room(len(prompt_ids), params, speaker.context_length, speaker.room)
    watch = Stopwatch()
    loop = RepetitionWatch()
    sampler = Sampler(params, make_generator(params.seed, speaker.decoder.device))
    report = _sparing(lambda part: speaker.on_progress(Progress("prefill", part)))
    count, note = 0, ""
    reason: FinishReason | None = None
    for token in generate_ids(
        speaker.decoder, prompt_ids, sampler, limit, speaker.stop_ids, cancelled, report, speaker.ahead
    ):
        watch.tick()
        count += 1
        if token in speaker.stop_ids:
            reason = "stop"
            break
        yield Chunk(text=text.add(token), tokens=count)
        if speaker.stop_repetition and loop.add(token):
            reason, note = "stop", "repetition"
            break
    finish = _finish_reason(reason, count, limit)
    yield Chunk(
        text=text.finish(),
        tokens=count,
        finish_reason=finish,
        usage=watch.usage(len(prompt_ids), count),
        note=note,
    )


def _finish_reason(reason: FinishReason | None, count: int, limit: int) -> FinishReason:
    return reason or ("length" if count >= limit else "cancelled")


def _sparing(report: Callable[[float], None], seconds: float = 0.2) -> Callable[[float], None]:
    """`report`, called at most once in `seconds`, and always at the end."""
    last = -seconds

    def call(part: float) -> None:
        nonlocal last
        now = time.monotonic()
        if part >= 1 or now - last >= seconds:
            last = now
            report(part)

    return call


class RepetitionWatch:
    """Notices a reply that says the same thing over and over: its end repeats with one period.

    A loop is at least `least` ids long and holds at least `rounds` repetitions, so that a table's rule,
    a chorus or a row of zeros passes. Costs `longest` comparisons an id.
    """

    def __init__(self, longest: int = 160, rounds: int = 5, least: int = 96) -> None:
        self._ids: list[int] = []
        self._needed = [max(least, rounds * period) for period in range(1, longest + 1)]
        self._runs = [0] * longest  # how many of the last ids equal the one `period` before them

    def add(self, token: int) -> bool:
        """Take the next id; True when the end is a loop."""
        ids, looping = self._ids, False
        for place in range(min(len(ids), len(self._runs))):
            run = self._runs[place] + 1 if ids[-1 - place] == token else 0
            self._runs[place] = run
            looping = looping or run + place + 1 >= self._needed[place]
        ids.append(token)
        return looping


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
