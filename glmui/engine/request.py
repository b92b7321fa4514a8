"""What every family needs to serve a request: its cancelling, the room for its reply, its timing."""

from __future__ import annotations

import time
from collections import deque

from glmui.errors import InvalidInput
from glmui.types import GenerationParams, Usage


class Cancellations:
    """The newest cancelled request ids. A cancel may come before its request or after it: no error."""

    def __init__(self, remembered: int = 256) -> None:
        self._ids: deque[str] = deque(maxlen=remembered)

    def add(self, request_id: str) -> None:
        self._ids.append(request_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in tuple(self._ids)  # a copy: another thread may be adding


def room(prompt_tokens: int, params: GenerationParams, context_length: int = 0, memory: int = 0) -> int:
    """How many ids a reply may have. context_length: what the model can take at all; memory: what there is
    memory for; each 0 for no bound. Raises InvalidInput when not even one: "prompt_beyond_memory" where it
    is memory that lacks the room, else "prompt_too_long".
    """
    length = min(params.max_length, context_length or params.max_length)
    if 0 < memory < length:
        if prompt_tokens >= memory:
            raise InvalidInput("prompt_beyond_memory", tokens=prompt_tokens, room=memory)
        length = memory
    if prompt_tokens >= length:
        raise InvalidInput("prompt_too_long", tokens=prompt_tokens, limit=length - 1)
    return min(length - prompt_tokens, params.max_new_tokens or length)


class Stopwatch:
    """Times one reply; `tick` at each token."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._first: float | None = None

    def tick(self) -> None:
        self._last = time.monotonic()
        if self._first is None:
            self._first = self._last

    def usage(self, prompt_tokens: int, completion_tokens: int) -> Usage:
        first = self._last if self._first is None else self._first
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            seconds=time.monotonic() - self._start,
            first_token_seconds=first - self._start,
            decode_seconds=self._last - first,
        )
