"""The figures of `glmui bench`: what is timed, how often, and in which order. No torch.

Every figure is the median of several short runs, fewer where one takes long. The read limit is taken between
the runs of the decode figure it is compared with, for a shared machine's speed changes from minute to minute.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

from glmui.types import EngineInfo

PROMPTS = (32, 128, 512)
CONTEXTS = (128, 1024)
LONG_CONTEXT = 8192  # decoded up to, by models that were trained on so much
BATCHES = (1, 2, 4, 8)
PEAKS = (512, 1024, 2048)  # tokens of a conversation, at which a card's memory is looked at
PREFILL_PEAK = 512  # tokens of the prompt, of which is told what reading it takes beside weights and cache
ABOVE = "peak_above_weights_and_cache_gb"
PUBLISHED = {"prefill": 512, "decode": 128}  # what is done the published way too, and its tokens
FULL_CONTEXT = 2048  # or the model's own, where that is less
MOST_STEPS = 32  # tokens decoded in one run, at most

_PREFILL_SECONDS, _DECODE_SECONDS = 90.0, 25.0  # for one figure, which is taken at least once
_RUN_SECONDS = 0.7  # of decoding
_MOST_RUNS = 5
_TOO_LONG = 240.0  # seconds for one prompt

Tell = Callable[..., None]  # (kind, **values), as wire.Wire.send


class NotMeasured(Exception):
    """A figure that cannot be taken. reason: a key under the locales' "cli.bench.why"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Rows(Protocol):
    """One or more sequences of one length, decoded together."""

    def reset(self) -> None:
        """Stand at the end of the context again."""
        ...

    def step(self) -> None:
        """Decode one token in each row, and wait for it. At most MOST_STEPS after a reset."""
        ...

    def cache_bytes(self) -> int:
        """What the first step after a reset reads of the KV cache."""
        ...


class Subject(Protocol):
    """A loaded model.

    weight_bytes: what decoding one token reads of its weights. reads_context: whether getting `at` a context
    takes reading a prompt of that length.
    """

    weight_bytes: int
    reads_context: bool

    def prefill(self, tokens: int) -> None:
        """Read a prompt of so many tokens that was not read before."""
        ...

    def at(self, context: int, rows: int) -> Rows:
        """`rows` sequences of `context` tokens. Raises NotMeasured where only one at a time is decoded."""
        ...


Published = Literal["prefill", "decode"]


@runtime_checkable
class OnCard(Protocol):
    """A Subject of which a part at least is on cards."""

    def peak(self, context: int) -> int:
        """The most bytes of VRAM that reading and answering take, once the conversation is so long."""
        ...

    def prefill_peak(self, tokens: int) -> int:
        """The most bytes of VRAM that reading a prompt takes beside the weights and the whole KV cache."""
        ...


@runtime_checkable
class WithPublished(Protocol):
    """A Subject that can do what the published code does, to be compared with."""

    def published(self, what: Published) -> float:
        """Tokens a second the published way, which widens a whole matrix and then multiplies."""
        ...


class Figures:
    """Takes all figures of one model and tells each as soon as it is there.

    tell: called with "doing", "figure" and "bytes". probe: takes the read limit once.
    """

    def __init__(self, subject: Subject, info: EngineInfo, tell: Tell, probe: Callable[[], None]) -> None:
        self._subject, self._info = subject, info
        self._tell, self._probe = tell, probe
        self._prefill_rate: float | None = None  # tokens a second, once known

    def take(self) -> None:
        self._subject.prefill(PROMPTS[0])  # the first pass brings the weights into memory
        for tokens in PROMPTS:
            self._figure("prefill_tok_s", tokens, self._prefill)
        for context in (*CONTEXTS, *self._long()):
            self._figure("decode_tok_s", context, self._decode)
        for rows in BATCHES:
            self._figure("batch_tok_s", rows, self._batch)
        self._reach_full_context()
        if isinstance(self._subject, OnCard):
            self._on_card(self._subject)
        if isinstance(self._subject, WithPublished) and has_limit(self._info.device):
            for what in PUBLISHED:
                self._figure("published_tok_s", what, self._subject.published)

    def _on_card(self, subject: OnCard) -> None:
        self._figure(ABOVE, PREFILL_PEAK, partial(self._prefill_peak, subject))
        for context in PEAKS:
            self._figure("peak_vram_gb", context, partial(self._peak, subject))

    def _peak(self, subject: OnCard, context: int) -> float:
        self._check_context(context - MOST_STEPS)
        return subject.peak(context) / 1e9

    def _prefill_peak(self, subject: OnCard, tokens: int) -> float:
        self._check_context(tokens)
        return subject.prefill_peak(tokens) / 1e9

    def _long(self) -> tuple[int, ...]:
        can = self._info.context_length >= LONG_CONTEXT and not self._subject.reads_context
        return (LONG_CONTEXT,) if can else ()

    def _figure(self, name: str, key: Any, take: Callable[[Any], float]) -> None:
        self._tell("doing", name=name, key=str(key))
        values: dict[str, Any] = {}
        try:
            values["value"] = take(key)
        except NotMeasured as missing:
            values = {"value": None, "why": missing.reason}
        self._tell("figure", name=name, key=str(key), **values)

    def _prefill(self, tokens: int) -> float:
        self._check_context(tokens)
        self._check_patience(tokens)
        self._prefill_rate = median_of(partial(prefill_rate, self._subject, tokens), _PREFILL_SECONDS)
        return self._prefill_rate

    def _decode(self, context: int) -> float:
        rows = self._at(context - MOST_STEPS if context == LONG_CONTEXT else context, 1)
        if context != CONTEXTS[0] or not has_limit(self._info.device):
            return decode_rate(rows)
        self._tell("bytes", weights=self._subject.weight_bytes, cache=rows.cache_bytes())
        return decode_rate(rows, self._probe)

    def _batch(self, rows: int) -> float:
        return rows * decode_rate(self._at(CONTEXTS[0], rows))

    def _reach_full_context(self) -> None:
        """Decode where the cache is as large as it gets, so that the memory's peak counts it."""
        with contextlib.suppress(NotMeasured):
            rows = self._at(min(self._info.context_length or FULL_CONTEXT, FULL_CONTEXT) - MOST_STEPS, 1)
            rows.reset()
            rows.step()

    def _at(self, context: int, rows: int) -> Rows:
        self._check_context(context)
        if self._subject.reads_context:
            self._check_patience(context)
        return self._subject.at(context, rows)

    def _check_context(self, tokens: int) -> None:
        if 0 < self._info.context_length < tokens + MOST_STEPS:
            raise NotMeasured("short_context")

    def _check_patience(self, tokens: int) -> None:
        if self._prefill_rate and tokens / self._prefill_rate > _TOO_LONG:
            raise NotMeasured("too_slow")


def has_limit(device: str) -> bool:
    """Whether one memory holds the whole model: this computer's, or one card's."""
    return device == "cpu" or device.startswith("cuda")


def prefill_rate(subject: Subject, tokens: int) -> float:
    """Tokens a second of one prompt."""
    began = time.perf_counter()
    subject.prefill(tokens)
    return tokens / (time.perf_counter() - began)


def decode_rate(rows: Rows, between: Callable[[], None] = lambda: None) -> float:
    """Steps a second, always from the same context. between: called before each run and after the last."""
    steps = _fitting_steps(rows)

    def once() -> float:
        rows.reset()
        began = time.perf_counter()
        for _ in range(steps):
            rows.step()
        rate = steps / (time.perf_counter() - began)
        between()
        return rate

    between()
    return median_of(once, _DECODE_SECONDS)


def _fitting_steps(rows: Rows) -> int:
    """How many steps make one short run; the first one warms up, too."""
    rows.reset()
    began = time.perf_counter()
    rows.step()
    return max(1, min(MOST_STEPS, int(_RUN_SECONDS / (time.perf_counter() - began))))


def median_of(once: Callable[[], float], seconds: float, most: int = _MOST_RUNS) -> float:
    """The median of what `once` gives in `most` calls, or in those that fit into `seconds` (one at least)."""
    results: list[float] = []
    began = time.monotonic()
    while len(results) < most:
        results.append(once())
        spent = time.monotonic() - began
        if spent + spent / len(results) > seconds:
            break
    return statistics.median(results)
