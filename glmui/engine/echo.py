"""The scripted engine: answers without a model, so that everything around a model can be tried and tested.

It says back what it was told. A message that begins with /echo chooses what happens instead:

    /echo tokens=500 speed=100          so many words, so many a second
    /echo load=3 prefill=2              seconds of each, with progress
    /echo error | oom | crash | hang    what can go wrong, after `tokens` words (5 if not given)
    /echo repeat | script | markdown    a loop that is noticed; HTML that must not run; all that markdown has
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from glmui.engine.request import Cancellations, Stopwatch, room
from glmui.errors import EngineError
from glmui.text import pieces
from glmui.types import (
    Chunk,
    EngineInfo,
    EngineSpec,
    FinishReason,
    GenerationParams,
    Message,
    Progress,
    Stage,
)

_STEPS = 10  # progress reports in a pretended load or prefill
_TROUBLE = ("error", "oom", "crash", "hang")
_SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> the rest of the reply"
_MARKDOWN = """# Heading

**bold**, *slanted*, `code`, [a link](https://example.org)

1. one
2. two

| left | right |
|------|------:|
| 你好 | 42    |

```python
print("hello")
```

Euler: $e^{i\\pi} + 1 = 0$, and \\(a^2\\), and \\[\\sum_{k=1}^n k = \\frac{n(n+1)}{2}\\]

$$\\int_0^1 x\\,dx$$
"""


@dataclass(frozen=True, slots=True)
class _Script:
    text: str
    trouble: str = ""
    tokens: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    speed: float = 0.0
    note: str = ""

    def words(self) -> list[str]:
        words = pieces.split(self.text)
        return words if self.tokens is None else list(itertools.islice(itertools.cycle(words), self.tokens))


def read_script(message: str) -> _Script:
    """What a message asks for. A word or number that means nothing here is part of a text to say back."""
    first, *words = message.split() or [""]
    if first != "/echo":
        return _Script(f"You said: {message}")
    script = _Script(" ".join(words) or "echo")
    for word in words:
        name, _, value = word.partition("=")
        if word in _TROUBLE:
            script = replace(script, trouble=word, tokens=script.tokens or 5)
        elif word == "script":
            script = replace(script, text=_SCRIPT)
        elif word == "markdown":
            script = replace(script, text=_MARKDOWN)
        elif word == "repeat":
            script = replace(script, text="again and ", tokens=96, note="repetition")
        elif name == "tokens" and value.isdecimal():
            script = replace(script, tokens=int(value), text="word " if not script.trouble else script.text)
        elif name == "speed" and _is_number(value):
            script = replace(script, speed=float(value))
        elif name in ("load", "prefill") and _is_number(value):
            script.seconds[name] = float(value)
    return script


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


class EchoEngine:
    """A ChatEngine (see types) that loads nothing.

    crash, hang: what /echo crash and /echo hang do; in an engine process they are real.
    """

    def __init__(
        self,
        spec: EngineSpec = EngineSpec("echo", "echo"),  # noqa: B008  (frozen)
        crash: Callable[[], None] | None = None,
        hang: Callable[[], None] | None = None,
        awake: bool = False,
    ) -> None:
        self._spec = spec
        self._crash = crash
        self._hang = hang
        self._awake = awake
        self._cancelled = Cancellations()
        self._changed = threading.Condition()

    def info(self) -> EngineInfo:
        return EngineInfo(
            state="ready" if self._awake else "asleep",
            model=self._spec.model,
            family="echo",
            device="cpu",
            dtype="none",
            threads=self._spec.threads or 1,
            pid=os.getpid(),
        )

    def stream_chat(
        self, messages: Sequence[Message], params: GenerationParams, request_id: str
    ) -> Iterator[Chunk]:
        """See types.ChatEngine."""
        script = read_script(messages[-1].content if messages else "")
        prompt_tokens = pieces.count(messages)
        limit = room(prompt_tokens, params)
        if not self._awake:
            yield from self._pretend("loading", script.seconds.get("load", 0), request_id)
            self._awake = True
        yield from self._pretend("prefill", script.seconds.get("prefill", 0), request_id)
        watch, count = Stopwatch(), 0
        words = script.words()
        for word in words[:limit]:
            if not self._wait(1 / script.speed if script.speed else 0, request_id):
                break
            watch.tick()
            count += 1
            yield Chunk(text=word, tokens=count)
        finish: FinishReason = "stop"
        if request_id in self._cancelled:
            finish = "cancelled"
        elif len(words) > limit:
            finish = "length"
        elif script.trouble:
            finish = self._trouble(script.trouble, request_id)
        note = script.note if finish == "stop" and self._spec.stop_repetition else ""
        usage = watch.usage(prompt_tokens, count)
        yield Chunk(tokens=count, finish_reason=finish, usage=usage, note=note)

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self._cancelled.add(request_id)
            self._changed.notify_all()

    def unload(self) -> None:
        self._awake = False

    def _pretend(self, stage: Stage, seconds: float, request_id: str) -> Iterator[Chunk]:
        for step in range(_STEPS if seconds else 1):
            yield Chunk(progress=Progress(stage, step / _STEPS))
            if not self._wait(seconds / _STEPS, request_id):
                return

    def _wait(self, seconds: float, request_id: str) -> bool:
        """Let time pass; False at once when the request is cancelled."""
        with self._changed:
            return not self._changed.wait_for(lambda: request_id in self._cancelled, seconds)

    def _trouble(self, kind: str, request_id: str) -> FinishReason:
        if kind == "oom":
            raise EngineError("out_of_memory")
        if kind == "crash" and self._crash:
            self._crash()
        if kind == "crash":
            raise EngineError("engine_died", detail="SIGKILL")
        if kind == "hang" and self._hang:
            self._hang()
        if kind == "hang":
            self._wait(3600, request_id)
            return "cancelled"
        raise EngineError("engine_failed", detail="/echo error")


def open_echo(spec: EngineSpec, on_progress: Callable[[Progress], None]) -> EchoEngine:
    """The echo of an engine process, where crash and hang are real. The model "echo load=3" loads for 3 s."""
    load = read_script(f"/{spec.model}").seconds.get("load", 0)
    for step in range(_STEPS):
        on_progress(Progress("loading", step / _STEPS))
        time.sleep(load / _STEPS)
    return EchoEngine(spec, crash=_kill_this_process, hang=_sleep_for_ever, awake=True)


def _kill_this_process() -> None:
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def _sleep_for_ever() -> NoReturn:
    while True:
        time.sleep(3600)
