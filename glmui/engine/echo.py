"""The scripted engine: answers without a model, so that everything around a model can be tried and tested.

It says back what it was told, unless a message chooses something else (see echo_script.py).

Named "echo vram=6 ram=16" it has the memory of such a machine (pretended.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from glmui.engine.echo_script import Script, read_script
from glmui.engine.request import Cancellations, Stopwatch, room
from glmui.errors import EngineError
from glmui.memory.forecast import Forecast, forecast
from glmui.meter import Reading
from glmui.text import pieces
from glmui.types import (
    PIECE,
    Chunk,
    EngineInfo,
    EngineSpec,
    FinishReason,
    GenerationParams,
    Message,
    Progress,
    Stage,
)

_LAYERS = 28  # that it pretends to have, as ChatGLM-6B does
_BLIND = Reading((), None, None, None, "no_driver")  # it looks at no real memory
_STEPS = 10  # progress reports in a pretended load or prefill


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
            device=self._device(),
            dtype="none",
            threads=self._spec.threads or 1,
            context_room=self._room(),
            layers=self._layers(),
            pid=os.getpid(),
        )

    def stream_chat(
        self, messages: Sequence[Message], params: GenerationParams, request_id: str
    ) -> Iterator[Chunk]:
        """See types.ChatEngine."""
        script = read_script(messages[-1].content if messages else "")
        prompt_tokens = pieces.count(messages)
        limit = room(prompt_tokens, params, memory=self._room())
        if not self._awake:
            yield from self._pretend("loading", script.seconds.get("load", 0), request_id)
            self._awake = True
        yield from self._pretend("prefill", script.seconds.get("prefill", 0), request_id)
        if script.hog:
            bytearray(script.hog * 10**6)
        if script.trouble != "oom":
            self.check_memory(script.most)
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
            finish = self._trouble(script, request_id)
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

    def _foreseen(self) -> Forecast | None:
        """What its memory is like on the machine that it pretends to run on (pretended.py), if on any."""
        return forecast(self._spec, _BLIND)

    def _room(self) -> int:
        found, most = self._foreseen(), self._spec.context_most
        return min(found.room, most or found.room) if found else most

    def _device(self) -> str:
        """The device that it pretends to be on; none of its layers is anywhere."""
        if found := self._foreseen():
            devices = {*found.plan.layers}
            return devices.pop() if len(devices) == 1 else "mixed"
        device = self._spec.device
        return "cpu" if device == "auto" else "cuda:0" if device == "cuda" else device

    def _layers(self) -> tuple[str, ...]:
        if found := self._foreseen():
            return found.plan.layers
        device = self._device()
        on_card = {"cpu": 0, "mixed": self._spec.layers_on_gpu}.get(device)
        count = _LAYERS if on_card is None else on_card
        card = "cuda:0" if device == "mixed" else device
        return (card,) * count + ("cpu",) * (_LAYERS - count)

    def check_memory(self, most: dict[str, int]) -> None:
        """Let memory run out, as it would in a model, where this engine has more of something than that."""
        spec = self._spec
        stages = {"piece": "prefill", "context": "decode", "layers": "loading"}
        has = {
            "piece": spec.prefill_piece or PIECE,
            "context": spec.context_most or spec.context,
            "layers": sum(device != "cpu" for device in self._layers()),
        }
        for name, bound in most.items():
            if has[name] > bound:
                raise self._out_of_memory(stages[name])

    def _out_of_memory(self, stage: str) -> EngineError:
        device = self._device()
        return EngineError("out_of_memory", stage=stage, device="cuda:0" if device == "mixed" else device)

    def _trouble(self, script: Script, request_id: str) -> FinishReason:
        kind = script.trouble
        if kind == "oom":
            self.check_memory(script.most)
            if not script.most:
                raise self._out_of_memory("decode")
            return "stop"
        if kind == "crash" and self._crash:
            self._crash()
        if kind == "crash":
            raise EngineError("engine_died", detail="exit code 3")
        if kind == "hang" and self._hang:
            self._hang()
        if kind == "hang":
            self._wait(3600, request_id)
            return "cancelled"
        raise EngineError("engine_failed", detail="/echo error")


def open_echo(spec: EngineSpec, on_progress: Callable[[Progress], None]) -> EchoEngine:
    """The echo of an engine process, where crash and hang are real.

    The model "echo load=3" loads for 3 s, "echo layers=7" only where no more of its layers are on the card.
    """
    script = read_script(f"/{spec.model}")
    load = script.seconds.get("load", 0)
    for step in range(_STEPS):
        on_progress(Progress("loading", step / _STEPS))
        time.sleep(load / _STEPS)
    engine = EchoEngine(spec, crash=_crash_for_good, hang=_sleep_for_ever, awake=True)
    engine.check_memory(script.most)
    return engine


def _crash_for_good() -> NoReturn:
    os._exit(3)


def _sleep_for_ever() -> NoReturn:
    while True:
        time.sleep(3600)
